"""Real builds of the trained checkpoint, for tests that release and verify them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from phiconv import machine
from phiconv.batch import build_all, load_recipes
from phiconv.progress import QuietDisplay
from phiconv.recipe import Overrides
from phiconv.release import ReleaseOptions, assemble, plan_release
from phiconv.report.document import read_report_file, report_json
from phiconv.report.results import RunResult
from phiconv.workspace import Workspace

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples" / "tiny-phi3"
CPU, CPU_1, CUDA, FP16, GGUF, GGUF_8 = (
    "int4-cpu",
    "int4-cpu-acc1",
    "int4-cuda",
    "fp16-cuda",
    "gguf-q4_k_m",
    "gguf-q8_0",
)
SMALL = ("check.windows=2", "check.window_length=64")

LICENCE = "MIT License\n\nCopyright (c) the makers\n"
NOTICE = "Words of the makers\r\n"
CARD = "---\nlicense: mit\nlicense_link: LICENSE\nlanguage: [en, de]\n---\n# Phi\n"

Edit = Callable[[dict[str, Any]], None]


def licensed_checkpoint(folder: Path) -> Path:
    """The trained checkpoint as one from the Hub: with card, licence and notice."""
    shutil.copytree(TINY, folder)
    (folder / "LICENSE").write_bytes(LICENCE.encode())
    (folder / "NOTICE.md").write_bytes(NOTICE.encode())
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def build(
    names: tuple[str, ...], checkpoint: Path, out: Path, home: Path, *settings: str
) -> dict[str, Path]:
    """Builds shipped recipes; gives the output folder of each."""
    recipes = load_recipes(
        [ROOT / "recipes" / f"{name}.yaml" for name in names],
        Overrides(str(checkpoint), None, settings or SMALL),
    )
    outcomes = build_all(recipes, Workspace(home), QuietDisplay(), out=out, threads=2)
    assert [outcome.error for outcome in outcomes] == [None] * len(names)
    folders = {name: out / recipe.name for name, recipe in zip(names, recipes, strict=True)}
    return folders if len(names) > 1 else {names[0]: out}


def release(places: list[Path], to: Path, home: Path, **options: Any) -> Path:
    """Releases outputs; gives the folder. GGUF files may lack llama.cpp, as on Windows."""
    if machine.llama_cpp_binding() is None:
        options["allow"] = (*options.get("allow", ()), "not-run:llama.cpp")
    plan = plan_release(places, ReleaseOptions(**options))
    assemble(plan, to, Workspace(home), threads=2)
    return to


def copied(output: Path, folder: Path) -> Path:
    """A copy of an output, to be spoilt."""
    shutil.copytree(output, folder)
    return folder


def edit_manifest(output: Path, edit: Edit) -> None:
    """Changes manifest.json."""
    path = output / "manifest.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def edit_result(output: Path, edit: Callable[[RunResult], RunResult]) -> None:
    """Changes report.json, and what manifest.json says of the same."""
    path = output / "report" / "report.json"
    result = edit(read_report_file(path))
    path.write_text(report_json(result), encoding="utf-8")

    def follow(manifest: dict[str, Any]) -> None:
        manifest["release_path"] = result.release_path
        manifest["recipe"]["name"] = result.recipe
        manifest["verdict"] = result.status
        manifest["checkpoint"] |= {
            "source": result.checkpoint.source,
            "digest": result.checkpoint.digest,
            "revision": result.checkpoint.revision,
            "files": dict(result.checkpoint.files),
        }
        manifest["validations"] = [
            {"stage": item.stage, "status": item.status, "verdict": item.verdict}
            for item in result.validations
        ]

    edit_manifest(output, follow)


def on_target(result: RunResult) -> RunResult:
    """The same result, had the target provider been there."""

    def ran(validation: Any) -> Any:
        found = validation.measurement.provenance
        there = replace(found, provider=found.target_provider)
        return replace(validation, measurement=replace(validation.measurement, provenance=there))

    return replace(result, validations=tuple(map(ran, result.validations)))
