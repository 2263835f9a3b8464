"""`phiconv index`, and the index of several builds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from phiconv.batch import build_all, load_recipes
from phiconv.errors import RecipeError
from phiconv.index import default_page, find_reports
from phiconv.progress import QuietDisplay
from phiconv.recipe import Overrides
from phiconv.report.document import report_json
from tests.report.results import measured, result, validation
from tests.terminal import Terminal
from tests.toy_stages import RECIPE, Bench, assert_whole, registry


def save(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    found = replace(result(validation("check", measured())), recipe=name)
    (folder / "report.json").write_text(report_json(found), encoding="utf-8")
    return folder


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    save(tmp_path / "dist" / "a b" / "report", "first")
    save(tmp_path / "dist" / "c-validation", "second")
    return tmp_path / "dist"


def links(page: Path) -> list[str]:
    return re.findall(r'<a href="([^"]+)"', page.read_text(encoding="utf-8"))


def test_a_folder_of_outputs_gets_a_page(dist: Path, phiconv: Terminal) -> None:
    done = phiconv("index", str(dist))
    assert done.code == 0
    assert done.out == f"{dist / 'index.html'}: 2 reports\n"
    assert links(dist / "index.html") == ["a%20b/report/report.html", "c-validation/report.html"]
    assert phiconv("index", str(dist)).code == 0, "it replaces its own page"
    assert not list(dist.glob(".*"))


def test_outputs_one_by_one_in_the_order_given(dist: Path, phiconv: Terminal) -> None:
    places = [dist / "c-validation", dist / "a b", dist / "a b" / "report" / "report.json"]
    assert [path.parent.name for path in find_reports(places)] == ["c-validation", "report"]
    assert default_page(places[:2]) == dist / "index.html"
    out = dist.parent / "pages" / "all.html"
    done = phiconv("index", *map(str, places), "--out", str(out))
    assert done.out == f"{out}: 2 reports\n"
    assert links(out)[0] == "../dist/c-validation/report.html"


def test_a_page_of_ones_own_is_let_be(dist: Path, phiconv: Terminal) -> None:
    (dist / "index.html").write_text("<p>mine")
    done = phiconv("index", str(dist))
    assert done.code == 2
    assert "index.html is not an index that phiconv wrote" in done.err
    assert (dist / "index.html").read_text() == "<p>mine"


def test_nothing_to_show_is_an_error(tmp_path: Path, phiconv: Terminal) -> None:
    done = phiconv("index", str(tmp_path))
    assert done.code == 2
    assert "there is no report.json at" in done.err
    assert not (tmp_path / "index.html").exists()


def test_several_builds_get_an_index_beside_their_folders(bench: Bench) -> None:
    names = ("one", "two")
    files = [bench.recipe(RECIPE.replace("toy", name, 1), f"{name}.yaml") for name in names]
    recipes = load_recipes(files, Overrides(model=str(bench.checkpoint)), registry())
    workspace, out = bench.workspace, bench.out

    outcomes = build_all(recipes, workspace, QuietDisplay(), registry(), out=out)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0]
    assert links(out / "index.html") == ["one/report/report.html", "two/report/report.html"]
    (out / "index.html").write_text("mine")
    with pytest.raises(RecipeError, match="not an index"):
        build_all(recipes, workspace, QuietDisplay(), registry(), out=out)
    assert_whole(out / "one")

    single = out.parent / "single"
    build_all(recipes[:1], workspace, QuietDisplay(), registry(), out=single)
    assert not (single / "index.html").exists()
