from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phiconv.batch import build_all, load_recipes, output_folders, worst
from phiconv.errors import EnvironmentLacksError, PhiconvError, RecipeError, StageError
from phiconv.progress import QuietDisplay
from phiconv.recipe import Overrides
from phiconv.report.document import read_report
from phiconv.stages.stage import StageContext
from phiconv.summary import error_text, outcome_lines
from phiconv.workspace import entry
from tests.test_plan import STAMPED
from tests.toy_stages import (
    RECIPE,
    Bench,
    Measure,
    Stamp,
    WriteOnnx,
    assert_whole,
    files_in,
    registry,
)

ALL = ["onnx", "int4", "int4.onnx", "tokens", "check"]


def text_of(bench: Bench, outcome) -> str:  # type: ignore[no-untyped-def]
    return "\n".join(line for line, _ in outcome_lines(outcome))


def test_builds_and_publishes(bench: Bench) -> None:
    outcome = bench.build()
    assert outcome.exit_code == 0
    assert bench.states(outcome) == dict.fromkeys(ALL, False)
    assert_whole(bench.out)
    names = files_in(bench.out / "artifact")
    assert sorted(names) == ["model.json", *(f"weights/part-{part}.bin" for part in range(3))]
    assert sorted(files_in(bench.out / "report")) == [
        "junit.xml",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert list(bench.workspace.sessions.iterdir()) == []


def test_the_result_tells_what_was_done(bench: Bench) -> None:
    outcome = bench.build()
    assert outcome.built is not None
    result = outcome.built.result
    report = (bench.out / "report" / "report.json").read_text(encoding="utf-8")
    assert read_report(report, "report.json") == result
    for stage in result.stages:
        assert stage.wall_s is not None and stage.wall_s >= 0
        assert stage.cpu_s is not None
        assert stage.peak_rss_bytes is not None and stage.peak_rss_bytes > 10**7
        assert stage.size_bytes
    assert {file.path: file.size_bytes for file in result.files} == {
        name: len(data) for name, data in files_in(bench.out / "artifact").items()
    }
    assert result.checkpoint.digest.startswith("sha256:")
    assert "config.json" in result.checkpoint.files
    assert result.tools["phiconv"]
    assert result.stages[2].facts == {"parts": 3}


def test_a_second_build_is_all_hits_and_leaves_the_report(bench: Bench) -> None:
    bench.build()
    before = files_in(bench.out)
    outcome = bench.build()
    assert bench.states(outcome) == dict.fromkeys(ALL, True)
    assert files_in(bench.out) == before
    assert "[3/5] int4.onnx: cached" in bench.shown.getvalue()
    assert "all cached" in text_of(bench, outcome)


def test_two_builds_are_byte_identical(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    checkpoint = shutil.copytree(bench.checkpoint, tmp_path / "other" / "model")
    other = Bench(tmp_path / "other", checkpoint)
    bench.build(threads=1)
    other.build(threads=7)
    assert files_in(bench.out / "artifact") == files_in(other.out / "artifact")
    assert (bench.out / "manifest.json").read_bytes() == (other.out / "manifest.json").read_bytes()
    assert str(tmp_path) not in (bench.out / "manifest.json").read_text()


def test_a_changed_limit_judges_again_without_running_anything(bench: Bench) -> None:
    measure = Measure()
    stages = registry(measure=measure)
    assert bench.build(RECIPE, stages).exit_code == 0
    failed = bench.build(RECIPE, stages, "check.gates.top1_agreement.min=0.99")
    assert failed.exit_code == 4
    assert measure.runs == 1
    assert bench.states(failed) == dict.fromkeys(ALL, True)
    manifest = json.loads((bench.out / "manifest.json").read_text())
    assert manifest["verdict"] == "failed"
    assert_whole(bench.out)
    text = text_of(bench, failed)
    assert "toy: failed on CPUExecutionProvider" in text
    assert "failed: top1_agreement measured 0." in text
    assert "limit min 0.99, provider CPUExecutionProvider, tokens toy 1x4" in text
    assert bench.build(RECIPE, stages).exit_code == 0
    assert json.loads((bench.out / "manifest.json").read_text())["verdict"] == "passed"


def test_what_was_not_run_never_counts_as_passed(bench: Bench) -> None:
    outcome = bench.build(RECIPE, None, "check.provider=DmlExecutionProvider")
    assert outcome.exit_code == 5
    assert "toy: not run, target DmlExecutionProvider not present" in text_of(bench, outcome)
    assert_whole(bench.out)


def test_no_validation_is_said(bench: Bench) -> None:
    outcome = bench.build("".join(RECIPE.splitlines(keepends=True)[:-1]))
    assert outcome.exit_code == 0
    assert "toy: built, not validated" in text_of(bench, outcome)


def test_rebuild_runs_everything(bench: Bench) -> None:
    bench.build()
    before = files_in(bench.out / "artifact")
    assert bench.states(bench.build(rebuild=True)) == dict.fromkeys(ALL, False)
    assert files_in(bench.out / "artifact") == before


def test_what_was_moved_to_the_output_is_read_again_as_a_copy(bench: Bench) -> None:
    bench.build()
    [entry] = [entry for entry in bench.workspace.entries() if entry.step == "int4.onnx"]
    assert entry.path == bench.out.resolve() / "artifact"
    outcome = bench.build(RECIPE, None, "check.provider=DmlExecutionProvider")
    assert bench.states(outcome) == {**dict.fromkeys(ALL, True), "check": False}
    assert_whole(bench.out)


def test_an_output_removed_by_hand_is_made_again(bench: Bench) -> None:
    bench.build()
    before = files_in(bench.out / "artifact")
    shutil.rmtree(bench.out)
    assert bench.states(bench.build()) == {**dict.fromkeys(ALL, True), "int4.onnx": False}
    assert files_in(bench.out / "artifact") == before


def test_an_output_removed_while_another_is_built_is_made_again(bench: Bench) -> None:
    bench.build()
    (bench.folder / "mark.txt").write_text("x")

    def remove(ctx: StageContext) -> None:
        shutil.rmtree(bench.out)

    text = STAMPED.replace("id: check, uses: measure", "id: check, from: int4, uses: measure")
    outcome = bench.build(text, registry(stamp=Stamp(remove)), "check.provider=Dml")
    assert outcome.built is not None, outcome.error
    assert_whole(bench.out)


def test_a_removed_entry_is_made_again(bench: Bench) -> None:
    bench.build()
    [entry] = [entry for entry in bench.workspace.entries() if entry.step == "int4.onnx"]
    (entry.path / "model.json").write_text("{}")
    states = bench.states(bench.build())
    assert states == {**dict.fromkeys(ALL, True), "int4.onnx": False}
    assert_whole(bench.out)


def failing(bench: Bench, error: BaseException) -> PhiconvError:
    (bench.folder / "mark.txt").write_text("x")

    def fail(ctx: StageContext) -> None:
        raise error

    outcome = bench.build(STAMPED, registry(stamp=Stamp(fail)))
    assert outcome.built is None
    assert outcome.error is not None
    return outcome.error


def test_a_failed_stage_keeps_the_old_output_and_is_never_cached(bench: Bench) -> None:
    bench.build()
    before = files_in(bench.out)
    error = failing(bench, StageError("it broke", where="tensor w"))
    assert error.exit_code == 3
    assert error.where == f"stage 'mark' ({bench.folder / 'toy.yaml'}:7): tensor w"
    assert files_in(bench.out) == before
    assert "mark" not in {entry.step for entry in bench.workspace.entries()}
    assert list(bench.workspace.sessions.iterdir()) == []
    assert bench.build(STAMPED).exit_code == 0


def test_unfinished_work_outlives_a_failure_but_not_the_artifact(bench: Bench) -> None:
    (bench.folder / "mark.txt").write_text("x")
    found: list[list[str]] = []

    def work(ctx: StageContext) -> None:
        assert ctx.unfinished is not None
        ctx.unfinished.mkdir(exist_ok=True)
        found.append(sorted(path.name for path in ctx.unfinished.iterdir()))
        (ctx.unfinished / f"layer-{len(found)}").write_text("done")
        if len(found) < 3:
            raise StageError("killed")

    stages = registry(stamp=Stamp(work))
    assert [bench.build(STAMPED, stages).exit_code for _ in range(3)] == [3, 3, 0]
    assert found == [[], ["layer-1"], ["layer-1", "layer-2"]]
    assert list(bench.workspace.unfinished.iterdir()) == []
    found[:] = [[]]
    bench.build(STAMPED, stages, rebuild=True)
    bench.build(STAMPED, stages, rebuild=True)
    assert found[1:] == [[], []]


def test_an_output_that_cannot_be_is_refused_before_any_work(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.folder / "file").touch()
    recipes = load_recipes([bench.recipe()], Overrides(model=str(bench.checkpoint)), registry())

    def refused(out: Path) -> PhiconvError:
        with pytest.raises(PhiconvError) as caught:
            build_all(recipes, bench.workspace, QuietDisplay(), registry(), out=out)
        assert bench.workspace.home.exists() is False or bench.workspace.entries() == []
        return caught.value

    error = refused(bench.folder / "file" / "out")
    assert (error.message, error.exit_code) == (f"{bench.folder / 'file'} is a file", 2)
    error = refused(bench.checkpoint)
    assert (error.message, error.exit_code) == ("the output folder is the model's own", 2)
    monkeypatch.setattr(os, "access", lambda path, mode: path != bench.folder)
    error = refused(bench.folder / "new" / "out")
    assert (error.message, error.exit_code) == ("the output folder cannot be written", 5)
    assert error.where == str(bench.folder)


def test_an_output_that_cannot_be_written_is_the_environments_fault(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "report.html")

    monkeypatch.setattr("phiconv.run.publish", fail)
    error = bench.build().error
    assert isinstance(error, EnvironmentLacksError)
    assert error.message == "the output cannot be written: Permission denied"
    assert error.where == "report.html"


@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_what_ends_a_step_says_that_its_work_is_kept(
    stop: type[BaseException], rebuild: bool, bench: Bench
) -> None:
    (bench.folder / "mark.txt").write_text("x")

    def work(ctx: StageContext) -> None:
        assert ctx.unfinished is not None
        ctx.unfinished.mkdir()
        (ctx.unfinished / "layer-0").touch()
        raise stop(errno.ENOSPC, "full", "x")

    try:
        error = bench.build(STAMPED, registry(stamp=Stamp(work)), rebuild=rebuild).error
    except KeyboardInterrupt as interrupt:
        notes = interrupt.__notes__
    else:
        assert error is not None
        notes = error.__notes__
        assert f"  note: {notes[0]}" in error_text(error)
    build = "build without --rebuild" if rebuild else "build"
    assert notes == [f"what stage 'mark' has done is kept: the next {build} goes on there"]


def test_a_full_disk_is_the_environments_fault(bench: Bench) -> None:
    error = failing(bench, OSError(errno.ENOSPC, "No space left on device", "x"))
    assert isinstance(error, EnvironmentLacksError)
    assert error.message.startswith("the disk is full: ")
    assert "stage 'mark'" in str(error.where)
    assert "phiconv cache gc" in str(error.remedy)


def test_other_operating_system_errors_fail_the_stage(bench: Bench) -> None:
    error = failing(bench, PermissionError(errno.EACCES, "Permission denied", "secret.txt"))
    assert isinstance(error, StageError)
    assert "secret.txt" in str(error.where)


def test_a_limit_of_the_machine_is_the_environments_fault(bench: Bench) -> None:
    error = failing(bench, OSError(errno.EFBIG, "File too large", "model.onnx.data"))
    assert isinstance(error, EnvironmentLacksError)
    assert "model.onnx.data" in str(error.where)
    assert "ulimit -f" in str(error.remedy)


def test_too_little_memory_is_the_environments_fault(bench: Bench) -> None:
    error = failing(bench, MemoryError("cannot allocate 5 GB"))
    assert error.exit_code == 5
    assert "cannot allocate 5 GB" in error.message


def test_an_interrupt_leaves_nothing(bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        failing(bench, KeyboardInterrupt())
    kept = "finished stages are kept; 'mark' begins again in the next build"
    assert stopped.value.__notes__ == [kept]
    assert list(bench.workspace.sessions.iterdir()) == []
    assert not bench.out.exists()


def test_several_recipes_share_steps_and_a_failure_stops_only_its_own(bench: Bench) -> None:
    (bench.folder / "mark.txt").write_text("x")

    def fail(ctx: StageContext) -> None:
        raise StageError("it broke")

    stages = registry(stamp=Stamp(fail))
    files = [
        bench.recipe(RECIPE.replace("name: toy", "name: one"), "one.yaml"),
        bench.recipe(STAMPED.replace("name: toy", "name: two"), "two.yaml"),
        bench.recipe(RECIPE.replace("name: toy", "name: three"), "three.yaml"),
    ]
    recipes = load_recipes(files, Overrides(model=str(bench.checkpoint)), stages)
    outcomes = build_all(recipes, bench.workspace, QuietDisplay(), stages, out=bench.out)
    assert [outcome.exit_code for outcome in outcomes] == [0, 3, 0]
    assert worst([outcome.exit_code for outcome in outcomes]) == 3
    assert bench.states(outcomes[2]) == dict.fromkeys(ALL, True)
    assert_whole(bench.out / "one")
    assert_whole(bench.out / "three")
    assert not (bench.out / "two").exists()


def test_the_worst_exit_code_stands_for_all() -> None:
    assert worst([0, 0]) == 0
    assert worst([0, 4]) == 4
    assert worst([4, 5, 0]) == 5
    assert worst([5, 3, 4]) == 3


def test_recipes_of_one_name_are_refused(bench: Bench) -> None:
    files = [bench.recipe(RECIPE, "one.yaml"), bench.recipe(RECIPE, "two.yaml")]
    with pytest.raises(RecipeError, match="two recipes have the name 'toy'"):
        load_recipes(files, Overrides(model=str(bench.checkpoint)), registry())


def test_output_folders(bench: Bench) -> None:
    one = bench.load(RECIPE, registry())
    two = bench.load(RECIPE.replace("name: toy", "name: other"), registry())
    out = Path("x")
    assert output_folders([one], None) == {"toy": Path("dist/toy")}
    assert output_folders([one], out) == {"toy": out}
    assert output_folders([one, two], out) == {"toy": out / "toy", "other": out / "other"}


def test_output_that_is_the_users_is_refused_before_any_work(bench: Bench) -> None:
    (bench.out / "artifact").mkdir(parents=True)
    (bench.out / "artifact" / "thesis.docx").write_text("years of work")
    with pytest.raises(RecipeError, match=r"thesis\.docx"):
        bench.build()
    assert not bench.workspace.home.exists() or bench.workspace.entries() == []


def test_two_processes_building_one_thing_make_it_once(bench: Bench) -> None:
    program = f"""
import json
import sys
from pathlib import Path
from tests.toy_stages import RECIPE, Bench, WriteOnnx, registry
bench = Bench(Path({str(bench.folder)!r}), Path({str(bench.checkpoint)!r}))
bench.out = bench.folder / sys.argv[1]
outcome = bench.build(RECIPE, registry(write_onnx=WriteOnnx(pause=0.1)))
print(json.dumps([stage.id for stage in outcome.built.result.stages if not stage.cached]))
print(bench.shown.getvalue())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, name],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for name in ("out1", "out2")
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    built = sorted(step for output in outputs for step in json.loads(output.splitlines()[0]))
    assert built == sorted(ALL)
    assert sum("another process is building it, waiting" in output for output in outputs) >= 1
    for name in ("out1", "out2"):
        assert_whole(bench.folder / name)


def test_large_parts_are_hashed_by_the_stage_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = entry.sha256_file

    def sha256_file(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(entry, "sha256_file", sha256_file)
    bench.build(RECIPE, registry(write_onnx=WriteOnnx(part_bytes=1 << 16)))
    assert "model.json" in hashed
    assert not [name for name in hashed if name.endswith(".bin")]
