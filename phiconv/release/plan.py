"""What goes where in a release, decided and checked before a file is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phiconv.checkpoint.licence import ModelTerms
from phiconv.errors import PhiconvError, RecipeError
from phiconv.release.admission import Waiver, admit, parse_allowances
from phiconv.release.output import Output, open_outputs, raise_all
from phiconv.release.source_date import source_date
from phiconv.report.results import CheckpointRecord
from phiconv.stages.stage import GGUF
from phiconv.verify.documents import CARD, PROVENANCE, REPORTS, SBOM
from phiconv.verify.sums import SUMS, is_portable

_IDS = "ids_digest"
"""The fact that stages note which read texts."""
_SUFFIX = {frozenset({"onnx"}): "-onnx", frozenset({"gguf"}): "-gguf"}


@dataclass(frozen=True)
class ReleaseOptions:
    """What the command line says besides the outputs.

    Attributes:
        name: Title of the model card; by default made of the source model's name.
        base_model: Hub id of the source model, where it was built from a local folder.
        allow: Exceptions, such as `not-run:dml`.
        builder_id: URI of who builds, for the provenance statement.
    """

    name: str | None = None
    base_model: str | None = None
    allow: tuple[str, ...] = ()
    builder_id: str = "urn:phiconv:local"


@dataclass(frozen=True)
class Item:
    """One artifact of a release.

    Attributes:
        output: The build.
        path: Its folder in the release, or its file for GGUF.
        files: The path in the release of each file of the artifact.
        waivers: The exceptions it was let in by.
    """

    output: Output
    path: str
    files: Mapping[str, str]
    waivers: tuple[Waiver, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(size for _, size in self.output.files.values())

    @property
    def calibrations(self) -> tuple[tuple[str, str], ...]:
        """Stages that were calibrated on texts, each with the digest of the token ids."""
        return tuple(
            (stage.uses, str(stage.facts[_IDS]))
            for stage in self.output.result.stages
            if _IDS in stage.facts and stage.uses != "reference"
        )

    @property
    def reports(self) -> str:
        """The folder of its reports in the release."""
        return f"{REPORTS}/{self.output.name}"


@dataclass(frozen=True)
class ReleasePlan:
    """A release that may be made.

    Attributes:
        name: Its title.
        items: The artifacts, by path.
        checkpoint: The model they were all made from.
        terms: The licence of that.
        base_model: Its Hub id, where it has one.
        builder_id: URI of who builds.
        date: When, if SOURCE_DATE_EPOCH says so.
    """

    name: str
    items: tuple[Item, ...]
    checkpoint: CheckpointRecord
    terms: ModelTerms
    base_model: str | None
    builder_id: str
    date: str | None = None


def plan_release(places: Sequence[Path], options: ReleaseOptions) -> ReleasePlan:
    """Opens the outputs and decides what goes where.

    Raises:
        RecipeError: There is no output or no such exception, two are made from different models or
            ship the same file, or a recipe does not say where its artifact goes.
        StageError: An output is damaged.
        GateError: A gate did not pass, or was not run and that was not allowed.
    """
    allowed = parse_allowances(options.allow)
    outputs = open_outputs(places)
    _check_names(outputs)
    checkpoint = _one_checkpoint(outputs)
    refused: list[PhiconvError] = []
    misplaced: list[PhiconvError] = []
    items = []
    for output in outputs:
        waivers, problems = admit(output, allowed)
        refused += problems
        if output.release_path is None:
            misplaced.append(_nowhere(output))
        else:
            items.append(_item(output, output.release_path, waivers))
    raise_all([*refused, *misplaced])
    terms = outputs[0].terms
    _check_collisions(items, terms)
    base_model = options.base_model or _hub_id(checkpoint)
    kinds = frozenset(item.output.kind for item in items)
    source = (base_model or checkpoint.source).rpartition("/")[2]
    return ReleasePlan(
        name=options.name or f"{source}{_SUFFIX.get(kinds, '')}",
        items=tuple(sorted(items, key=lambda item: item.path)),
        checkpoint=checkpoint,
        terms=terms,
        base_model=base_model,
        builder_id=options.builder_id,
        date=source_date(),
    )


def _item(output: Output, place: str, waivers: tuple[Waiver, ...]) -> Item:
    prefix = "" if place == "." else f"{PurePosixPath(place).as_posix()}/"
    files = {name: f"{prefix}{name}" for name in output.files}
    single = output.kind == GGUF and len(files) == 1
    path = next(iter(files.values())) if single else prefix.rstrip("/") or "."
    return Item(output, path, files, waivers)


def _nowhere(output: Output) -> RecipeError:
    return RecipeError(
        f"{output.name}: its recipe does not say where the artifact goes in a release",
        where=str(output.folder),
        remedy="add `release: {path: …}` to the recipe and build again: nothing is recomputed",
    )


def _check_names(outputs: Sequence[Output]) -> None:
    seen: dict[str, Output] = {}
    for output in outputs:
        other = seen.setdefault(output.name.lower(), output)
        if other is not output:
            raise RecipeError(
                f"two outputs have the name {output.name!r}: {other.folder} and {output.folder}",
                remedy="release one of them, or give the recipes different names",
            )


def _one_checkpoint(outputs: Sequence[Output]) -> CheckpointRecord:
    """The model that all outputs were made from; from the Hub rather than from a copy."""
    by_digest: dict[str, list[Output]] = {}
    for output in outputs:
        by_digest.setdefault(output.result.checkpoint.digest, []).append(output)
    if len(by_digest) > 1:
        said = "; ".join(
            f"{', '.join(output.name for output in group)} from {_source(group[0])}"
            for group in by_digest.values()
        )
        raise RecipeError(
            f"the outputs were made from {len(by_digest)} different models: {said}",
            remedy="make a release for each model",
        )
    records = [output.result.checkpoint for output in outputs]
    return max(records, key=lambda record: (record.revision is not None, record.source))


def _source(output: Output) -> str:
    record = output.result.checkpoint
    revision = f" at {record.revision[:12]}" if record.revision else ""
    return f"{record.source}{revision} ({record.digest.rpartition(':')[2][:12]})"


def _hub_id(checkpoint: CheckpointRecord) -> str | None:
    """Only what was opened on the Hub has a revision."""
    return checkpoint.source if checkpoint.revision else None


def _check_collisions(items: Sequence[Item], terms: ModelTerms) -> None:
    """No two artifacts ship different files under one name, on any file system."""
    own = {CARD, SBOM, PROVENANCE, SUMS, *terms.files}
    taken: dict[str, tuple[str, str]] = {name.lower(): ("the release itself", "") for name in own}
    errors: list[PhiconvError] = []
    for item in items:
        for name, (sha256, _) in item.output.files.items():
            path = item.files[name]
            holder, digest = taken.setdefault(path.lower(), (item.output.name, sha256))
            if not is_portable(path):
                errors.append(_unshippable(item, path, "it is no path inside the release"))
            elif path.lower().startswith(f"{REPORTS}/"):
                errors.append(_unshippable(item, path, f"{REPORTS}/ is the release's own"))
            elif holder != item.output.name and digest != sha256:
                errors.append(_unshippable(item, path, f"{holder} has another such file"))
    raise_all(errors)


def _unshippable(item: Item, path: str, why: str) -> RecipeError:
    return RecipeError(
        f"{item.output.name}: {path} cannot be shipped: {why}",
        where=str(item.output.folder),
        remedy="give the recipes different `release: {path: …}` or file names",
    )
