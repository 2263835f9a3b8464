"""Output folders of builds, opened for a release: manifest and report, which must agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiconv.checkpoint.folder import is_licence_file
from phiconv.checkpoint.licence import ModelTerms
from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.index import INDEX
from phiconv.publish import ARTIFACT, MANIFEST, REPORT
from phiconv.report.results import RunResult
from phiconv.stages.stage import GGUF, ONNX
from phiconv.verify.output import contradictions, read_manifest, read_result
from phiconv.verify.sums import is_portable

_BUILD = "give output folders of `phiconv build`, or the folder that holds them"


@dataclass(frozen=True)
class Output:
    """The output folder of a build.

    Attributes:
        folder: The folder.
        manifest: manifest.json.
        result: What report.json holds.
        terms: The model's licence; none where an older phiconv made the output.
    """

    folder: Path
    manifest: Mapping[str, Any]
    result: RunResult
    terms: ModelTerms

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.result.recipe

    @property
    def release_path(self) -> str | None:
        """Where the recipe ships its artifact; `.` is the top of the release."""
        return self.result.release_path

    @property
    def files(self) -> Mapping[str, tuple[str, int]]:
        """sha256 and bytes of the artifact's files, by their paths in `artifact/`."""
        stamps = self.manifest[ARTIFACT].items()
        return {name: (stamp["sha256"], stamp["size"]) for name, stamp in sorted(stamps)}

    @property
    def kind(self) -> str:
        """`onnx` or `gguf`."""
        return GGUF if any(name.endswith(".gguf") for name in self.files) else ONNX

    @property
    def reports(self) -> tuple[str, ...]:
        """The report's files, by their paths in `report/`."""
        return tuple(sorted(self.manifest[REPORT]))

    @property
    def target(self) -> str:
        """The provider that the recipe builds for, in short, or `llama.cpp`."""
        if self.kind == GGUF:
            return "llama.cpp"
        stages = self.manifest["recipe"]["resolved"]["stages"]
        named = [entry["with"].get("provider") for entry in stages if entry["uses"] == _EXPORT]
        return next((name for name in named if name), "cpu")


_EXPORT = "export-onnx"


def open_outputs(places: Sequence[Path]) -> list[Output]:
    """Opens outputs; everything that is wrong with any of them is reported together.

    Args:
        places: Each an output folder of `phiconv build`, or a folder of such; an index page
            beside them is passed over.

    Raises:
        RecipeError: There is none at one of the places, or one is given twice.
        StageError: One is damaged.
    """
    folders: dict[Path, Path] = {}
    for place in places:
        if place.is_file() and place.name == INDEX:
            continue
        below = sorted(path.parent for path in place.glob(f"*/{MANIFEST}"))
        found = [place] if (place / MANIFEST).is_file() else below
        if not found:
            raise RecipeError(f"there is no {MANIFEST} at {place}", remedy=_BUILD)
        folders |= {folder.resolve(): folder for folder in found}
    if not folders:
        raise RecipeError("there is nothing to release", remedy=_BUILD)
    outputs: list[Output] = []
    errors: list[PhiconvError] = []
    for folder in folders.values():
        try:
            outputs.append(_open(folder))
        except PhiconvError as error:
            errors.append(error)
    raise_all(errors)
    return sorted(outputs, key=lambda output: (output.release_path or "", output.name))


def _open(folder: Path) -> Output:
    manifest = read_manifest(folder)
    result = read_result(folder)
    problems = contradictions(manifest, result)
    if problems:
        raise StageError(
            "; ".join(problem.what for problem in problems),
            where=str(folder),
            remedy="build it again: nothing has to be recomputed",
        )
    output = Output(folder, manifest, result, _terms(manifest, folder))
    _check_paths(output)
    return output


def _terms(manifest: Mapping[str, Any], folder: Path) -> ModelTerms:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ModelTerms).validate_python(manifest.get("terms", {}))
    except ValidationError as error:
        raise StageError(
            f"{MANIFEST} does not say the model's licence as phiconv does",
            where=str(folder),
            remedy="build it again: nothing has to be recomputed",
        ) from error


def _check_paths(output: Output) -> None:
    """An output may come from elsewhere: nothing it names leads out of its folder."""
    single = [*output.terms.files, output.name]
    names = [*output.files, *output.reports, *single]
    strange = [name for name in names if not is_portable(name)]
    strange += [name for name in single if "/" in name]
    strange += [name for name in output.terms.files if not is_licence_file(name)]
    if strange:
        raise StageError(
            f"{MANIFEST} names {strange[0]!r}, which cannot be a file of its own",
            where=str(output.folder),
            remedy="this may be an attack; build it yourself",
        )


def raise_all(errors: Sequence[PhiconvError]) -> None:
    """Raises the errors that were found, together."""
    from phiconv.errors import Problems

    if errors:
        raise errors[0] if len(errors) == 1 else Problems(list(errors))
