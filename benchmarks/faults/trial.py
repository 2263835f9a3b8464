"""One fault: planted in a copy, validated with the default gates, diagnosed, and judged."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.faults.folder_faults import FOLDER_FAULTS
from benchmarks.faults.gguf_faults import GGUF_FAULTS
from benchmarks.faults.graph_faults import GRAPH_FAULTS
from benchmarks.faults.planting import Site, Truth
from benchmarks.faults.stored import GgufWeights, OnnxWeights
from benchmarks.faults.subjects import KINDS, LATER, MODELS, ROOT, artifact
from benchmarks.faults.weight_faults import WEIGHT_FAULTS

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis import Fault
    from phiconv.report.results import Validation

CLEAN = "none"
_LAYERS = re.compile(r"layers? (\d+(?:, \d+)*)")
_TOKENS = {"windows": 2, "window_length": 256}
_DIAGNOSED = {"windows": 1, "window_length": 256}


@dataclass(frozen=True)
class Trial:
    """A fault to be planted: its class, where, and the seed that chooses the rest."""

    model: str
    kind: str
    fault: str
    seed: int


@dataclass
class Verdict:
    """What became of one trial.

    Attributes:
        planted: What was changed; None where such a fault cannot be in this artifact.
        caught_by: Gates that failed, or `refused` with the error.
        named_right: Whether what the validation says of a failed gate, or the first fault of the
            diagnosis, is right.
        said: The verdict of the diagnosis, or what the validation said.
        kl_mean: Mean KL divergence from the reference, nats.
        seen: Whether the diagnosis found any fault.
    """

    trial: Trial
    planted: str | None = None
    caught_by: list[str] = field(default_factory=list)
    named_right: bool = False
    said: str = ""
    kl_mean: float | None = None
    seen: bool = False


def classes(kind: str) -> list[str]:
    """The classes of faults for a kind of artifact."""
    other = GGUF_FAULTS if KINDS[kind].is_gguf else {**GRAPH_FAULTS, **FOLDER_FAULTS}
    return [CLEAN, *WEIGHT_FAULTS, *other]


def run(trial: Trial, clean: Path, scratch: Path) -> Verdict:
    """Plants, validates, diagnoses and judges one fault.

    Args:
        trial: What.
        clean: Where `build_all` put the artifacts.
        scratch: A folder of its own: the copy, and the workspace, which keeps the references.
    """
    from phiconv.checkpoint import resolve

    subject = artifact(clean, trial.model, trial.kind)
    copy = scratch / "subject" / subject.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    copy.parent.mkdir(parents=True)
    if subject.is_dir():
        shutil.copytree(subject, copy)
    else:
        shutil.copyfile(subject, copy)
    checkpoint = resolve(str(ROOT / "examples" / trial.model), None, None)
    (other,) = (model for model in MODELS if model != trial.model)
    site = Site(
        path=copy,
        other=artifact(clean, other, trial.kind),
        later=artifact(clean, trial.model + LATER, trial.kind),
        checkpoint=checkpoint,
        tokens=_token_counts(checkpoint),
        random=random.Random(f"{trial.model} {trial.kind} {trial.fault} {trial.seed}"),
    )
    truth = plant(trial, site)
    verdict = Verdict(trial, None if truth is None else truth.what)
    if truth is not None:
        _measure(verdict, truth, copy, scratch)
    return verdict


def plant(trial: Trial, site: Site) -> Truth | None:
    """Plants a trial's fault; `CLEAN` changes nothing."""
    if trial.fault == CLEAN:
        return Truth("nothing", ("*",))
    config = site.checkpoint.config
    if KINDS[trial.kind].is_gguf:
        weights = GgufWeights(site.path, config)
        if trial.fault in WEIGHT_FAULTS:
            other = _copied(site)
            truth = WEIGHT_FAULTS[trial.fault](weights, GgufWeights(other, config), site)
        else:
            truth = GGUF_FAULTS[trial.fault](weights, site)
        weights.flush()
        return truth
    if trial.fault in FOLDER_FAULTS:
        return FOLDER_FAULTS[trial.fault](site)
    graph = OnnxWeights(site.path, config)
    if trial.fault in WEIGHT_FAULTS:
        other = _copied(site)
        return WEIGHT_FAULTS[trial.fault](graph, OnnxWeights(other, config), site)
    truth = GRAPH_FAULTS[trial.fault](graph, site)
    graph.save()
    return truth


def _copied(site: Site) -> Path:
    """A copy of the other checkpoint's artifact: its arrays are opened for writing, too."""
    copy = site.path.parent / f"other-{site.other.name}"
    if site.other.is_dir():
        shutil.copytree(site.other, copy)
    else:
        shutil.copyfile(site.other, copy)
    return copy


def _token_counts(checkpoint: Checkpoint) -> Sequence[int]:
    import numpy as np

    from phiconv.tokens import load_token_set

    windows = load_token_set("default", checkpoint, windows=8, window_length=512).windows
    counts = np.bincount(windows.ravel(), minlength=checkpoint.config.vocab_size)
    return [int(count) for count in counts]


def _measure(verdict: Verdict, truth: Truth, path: Path, scratch: Path) -> None:
    from phiconv.errors import PhiconvError
    from phiconv.gates import DEFAULT
    from phiconv.progress import QuietDisplay
    from phiconv.stages.validate import Gate, ValidateParams
    from phiconv.validation import Subject, diagnose_artifact, judge_artifact
    from phiconv.workspace import Workspace

    kind = KINDS[verdict.trial.kind]
    runtime = "llama.cpp" if kind.is_gguf else "onnxruntime"
    where = {"provider": kind.provider, "when_missing": "fallback-cpu", "runtime": runtime}
    gates = {
        name: Gate(min=limit.get("min"), max=limit.get("max")) for name, limit in DEFAULT.items()
    }
    params = ValidateParams.model_validate({**where, **_TOKENS, "gates": gates})
    source = str(ROOT / "examples" / verdict.trial.model)
    workspace, display = Workspace(scratch / "workspace"), QuietDisplay()
    subject = Subject(path, source, None, params)
    try:
        said = _validate(verdict, judge_artifact(subject, workspace, display).validations[0])
    except PhiconvError as error:
        verdict.caught_by, said = ["refused"], [str(error)]
    verdict.said = said[0] if said else ""
    verdict.named_right = any(_names(line, truth) for line in said)
    if verdict.named_right or not truth.components:
        return
    params = ValidateParams.model_validate({**where, **_DIAGNOSED})
    try:
        diagnosis = diagnose_artifact(
            Subject(path, source, None, params), workspace, display, threads=1
        )
    except PhiconvError as error:
        verdict.named_right |= _names(str(error), truth)
        verdict.said = verdict.said or error.message
        return
    verdict.seen, verdict.said = bool(diagnosis.faults), diagnosis.verdict
    verdict.named_right |= _is_right(diagnosis.faults[:1], truth)


def _validate(verdict: Verdict, validation: Validation) -> list[str]:
    """Keeps what a validation measured; what the failed gates say, the first finding of each."""
    verdict.kl_mean = validation.measurement.metrics.get("kl_divergence.mean")
    failed = [gate for gate in validation.gates if not gate.passed]
    verdict.caught_by = [gate.metric for gate in failed]
    return [gate.detail for gate in failed if gate.detail]


def _names(line: str, truth: Truth) -> bool:
    """Whether a line of a validation says what is wrong, and where."""
    if any(word in line for word in truth.words):
        return True
    layers = {int(number) for found in _LAYERS.findall(line) for number in found.split(", ")}
    placed = not truth.layers or bool(layers & set(truth.layers))
    return placed and any(component in line for component in truth.components)


def _is_right(faults: Sequence[Fault], truth: Truth) -> bool:
    """Whether a fault is in the right place."""
    return any(
        truth.components == ("*",)
        or (
            fault.component in truth.components
            and (not truth.layers or bool(set(fault.layers) & set(truth.layers)))
        )
        for fault in faults
    )
