"""What a build found out: its measurements judged by the gates, and its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv import __version__, machine
from phiconv.report.results import (
    CheckpointRecord,
    FileRecord,
    RunResult,
    StageRecord,
    TensorKindRecord,
    Validation,
)
from phiconv.stages.stage import JSON, MEASUREMENT, Gated

if TYPE_CHECKING:
    from phiconv.plan import Plan, Step
    from phiconv.workspace import Entry

TENSOR_KINDS = "tensor_kinds"
"""The fact, noted with a written model, that reports show; so a hit need not be parsed again."""


@dataclass(frozen=True)
class Made:
    """A step's artifact and what it took."""

    entry: Entry
    record: StageRecord


@dataclass(frozen=True)
class Shipped:
    """The artifact that a report is about.

    Attributes:
        key: Its cache key.
        files: Its files.
        tensor_kinds: How its weights are stored.
    """

    key: str
    files: tuple[FileRecord, ...]
    tensor_kinds: tuple[TensorKindRecord, ...]

    @classmethod
    def of(cls, entry: Entry) -> Shipped:
        """What an entry of the workspace says."""
        return cls(
            entry.key,
            tuple(
                FileRecord(name, stamp.size, f"sha256:{stamp.sha256}")
                for name, stamp in entry.files.items()
            ),
            tuple(TensorKindRecord(**kind) for kind in entry.facts.get(TENSOR_KINDS, ())),
        )


def assess(plan: Plan, made: Mapping[str, Made], shipped: Shipped) -> RunResult:
    """Judges the measurements by the recipe's gates and collects what the build found out."""
    checkpoint = plan.checkpoint
    return RunResult(
        recipe=plan.recipe.name,
        recipe_digest=f"sha256:{plan.recipe.digest}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        checkpoint=CheckpointRecord(
            source=plan.recipe.source_name,
            digest=f"sha256:{checkpoint.digest}",
            revision=checkpoint.revision,
            architecture=checkpoint.config.architecture,
            files=checkpoint.digests,
        ),
        stages=tuple(item.record for item in made.values()),
        artifact_key=shipped.key,
        files=shipped.files,
        tensor_kinds=shipped.tensor_kinds,
        validations=tuple(
            _validation(plan, step, made[step.id].entry)
            for step in plan.steps
            if step.stage.produces == MEASUREMENT
        ),
        tools={"phiconv": __version__, **plan.tools},
        machine=machine.describe(),
        release_path=plan.recipe.text.release.path if plan.recipe.text.release else None,
    )


def measurement_folders(plan: Plan, made: Mapping[str, Made]) -> dict[str, Path]:
    """Where the measurement of each validate stage lies."""
    measured = (step for step in plan.steps if step.stage.produces == MEASUREMENT)
    return {step.id: made[step.id].entry.path for step in measured}


def _validation(plan: Plan, step: Step, entry: Entry) -> Validation:
    from phiconv.gates import judge
    from phiconv.report.document import read_measurement

    measurement = read_measurement(entry.path)
    limits = step.params.limits() if isinstance(step.params, Gated) else {}
    gates = judge(measurement, limits)
    return Validation(step.id, step.inputs[0].id, measurement, gates)


def manifest(plan: Plan, result: RunResult) -> dict[str, JSON]:
    """What manifest.json says besides the files; the same for every build of the same thing.

    So it holds no time, no path, no measured figure and nothing of the machine. The model's licence
    goes with it, so that a release needs no more than the output folder.
    """
    from phiconv.checkpoint.licence import model_terms

    recipe, terms = plan.recipe, model_terms(plan.checkpoint)
    return {
        "phiconv_version": __version__,
        "recipe": {
            "name": recipe.name,
            "text_sha256": recipe.text_sha256,
            "digest": result.recipe_digest,
            "resolved": recipe.resolved(),
        },
        "checkpoint": asdict(result.checkpoint),
        "terms": {**asdict(terms), "languages": list(terms.languages)},
        "steps": [
            {
                "id": step.id,
                "uses": step.stage.name,
                "version": step.stage.version,
                "key": step.key,
            }
            for step in plan.steps
        ],
        "tools": plan.tools,
        "verdict": result.status,
        "validations": [
            {"stage": item.stage, "status": item.status, "verdict": item.verdict}
            for item in result.validations
        ],
        "release_path": result.release_path,
    }
