"""From everything measured to the causes: which faults there are, and where the error enters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from phiconv.diagnosis.ladder import ACTIVATIONS, GRAPH, PROVIDER
from phiconv.diagnosis.results import (
    Fault,
    Finding,
    LayerError,
    OperatorError,
    Rung,
    TensorError,
)
from phiconv.diagnosis.weight_format import FLOATS
from phiconv.gates import DEFAULT
from phiconv.metrics import METRICS

# A block's error is about the root of the summed errors of its weights; softmax and the product of
# gate and up may raise it, but not this much.
_AMPLIFICATION = 8.0
# How many tolerances of its steps a block may add up.
_ACCUMULATED = 10.0
# With more than this share of the weights wrong, it is another model.
_OTHER_MODEL = 0.5
# What else a step may be wrong by.
_CAUSES = {
    "self_attn.attention": ("self_attn.rotary",),
    "input_layernorm": ("norms",),
    "post_attention_layernorm": ("norms",),
    "norm": ("norms",),
}
_BLOCKS = {"attention": "self_attn", "mlp": "mlp"}


@dataclass(frozen=True)
class Evidence:
    """What the parts of a diagnosis measured.

    Attributes:
        rungs: The ladder, the reference first.
        layers: The residual stream.
        operators: Every step.
        tensors: Every weight.
        findings: What the lints found.
        weights_stage: The rung at which the artifact's weights come in.
        graph_stage: The rung at which its graph does.
    """

    rungs: Sequence[Rung]
    layers: Sequence[LayerError]
    operators: Sequence[OperatorError]
    tensors: Sequence[TensorError]
    findings: Sequence[Finding]
    weights_stage: str
    graph_stage: str = GRAPH


def find_faults(evidence: Evidence) -> tuple[Fault, ...]:
    """The causes, those at the rung where the error enters first.

    A wrong step that a finding explains is evidence for that finding, and a block whose error
    nothing else explains is a fault of its own.
    """
    entry = entry_rung(evidence.rungs)
    faults = [*_findings(evidence.findings, evidence.graph_stage), *_tensors(evidence)]
    faults = _with_operators(faults, evidence, entry)
    faults += _unexplained_blocks(faults, evidence)
    return tuple(sorted(faults, key=lambda fault: entry is None or fault.stage != entry.stage))


def known_causes(findings: Sequence[Finding], tensors: Sequence[TensorError]) -> str:
    """What was found without running, for an artifact that does not run; empty if nothing."""
    faults = [*_findings(findings, GRAPH), *weight_faults(tensors, "weights")]
    if not faults:
        return ""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"found without running it: {faults[0].place}: {faults[0].message}{more}"


def _running_stage(evidence: Evidence, entry: Rung | None) -> str:
    """Where a wrong step belongs that no finding explains: to the graph, or to what runs it."""
    running = (ACTIVATIONS, PROVIDER)
    is_running = entry is not None and entry.stage in running
    return entry.stage if entry is not None and is_running else evidence.graph_stage


def entry_rung(rungs: Sequence[Rung]) -> Rung | None:
    """The rung at which the KL divergence rises most, or is no longer finite; None if at none."""
    before, entry, rise = 0.0, None, 0.0
    for rung in rungs:
        if not rung.on_path:
            continue
        if rung.kl_mean is None:
            return rung
        if rung.kl_mean - before > rise:
            entry, rise = rung, rung.kl_mean - before
        before = rung.kl_mean
    return entry


def failed_gates(rung: Rung) -> list[str]:
    """Which of the default gates, those of `phiconv validate`, a rung does not meet, in words."""
    if rung.kl_mean is None:
        return [rung.note or "the logits are not finite"]
    measured = {
        "kl_divergence.mean": rung.kl_mean,
        "top1_agreement": rung.top1_agreement,
        "perplexity.ratio": rung.perplexity_ratio,
    }
    failed = []
    for name, value in measured.items():
        title = METRICS[name].title
        for bound, limit in DEFAULT.get(name, {}).items():
            if value is None:
                failed.append(f"{title} not finite")
            elif (value > limit) if bound == "max" else (value < limit):
                failed.append(f"{title} {value:.3g}, limit {bound} {limit:g}")
    return failed


def verdict(evidence: Evidence, faults: Sequence[Fault]) -> str:
    """One sentence: the gravest fault with its place, or that there is none."""
    last, entry = evidence.rungs[-1], entry_rung(evidence.rungs)
    failed = failed_gates(last)
    measured = "" if last.kl_mean is None else f"mean KL {last.kl_mean:.3g}"
    stage = "" if entry is None else f", most of it from stage '{entry.stage}'"
    if faults:
        first = faults[0]
        where = f"at stage '{first.stage}', {first.place} ({first.message})"
        more = {1: "", 2: "; one more fault is listed"}.get(
            len(faults), f"; {len(faults) - 1} more faults are listed"
        )
        if not failed:
            return f"a fault {where}, though these tokens hardly show it ({measured}){more}"
        if entry is None or entry.stage == first.stage:
            return f"the error enters {where}{more}"
        return f"a fault {where}, but {'; '.join(failed)}{stage}{more}"
    if not failed:
        return f"no fault found: {measured}{stage}"
    formats = sorted({tensor.format for tensor in evidence.tensors} - FLOATS - {""})
    explained = f", which is the cost of {' and '.join(formats)} here" if formats else ""
    return f"no fault found, but {'; '.join(failed)}{stage}{explained}"


def _findings(findings: Sequence[Finding], stage: str) -> list[Fault]:
    return [
        Fault(stage, finding.component, finding.layers, finding.message)
        for finding in findings
        if finding.severity == "error"
    ]


def _tensors(evidence: Evidence) -> list[Fault]:
    if of_another_model(evidence.tensors):
        wrong = sum(tensor.is_fault for tensor in evidence.tensors)
        message = (
            f"{wrong} of {len(evidence.tensors)} weights are not the checkpoint's: the "
            "artifact seems to be made from another checkpoint"
        )
        return [Fault(evidence.weights_stage, "model", (), message)]
    return weight_faults(evidence.tensors, evidence.weights_stage)


def of_another_model(tensors: Sequence[TensorError]) -> bool:
    """Whether most weights of an artifact are not the checkpoint's."""
    wrong = sum(tensor.is_fault for tensor in tensors)
    return wrong > 2 and wrong > _OTHER_MODEL * len(tensors)


def weight_faults(tensors: Sequence[TensorError], stage: str) -> list[Fault]:
    """The weights that are wrong, those that are furthest off first."""
    wrong = sorted((tensor for tensor in tensors if tensor.is_fault), key=lambda t: -_deficit(t))
    return [
        Fault(
            stage,
            tensor.component,
            () if tensor.layer is None else (tensor.layer,),
            _tensor_message(tensor),
            (f"stored as {tensor.initializer}, {tensor.format}",),
        )
        for tensor in wrong
    ]


def _deficit(tensor: TensorError) -> float:
    """How far below its expected SQNR a weight is, dB; what cannot be compared comes first."""
    if tensor.sqnr_db is None:
        return float("inf")
    return (200.0 if tensor.expected_db is None else tensor.expected_db) - tensor.sqnr_db


def _tensor_message(tensor: TensorError) -> str:
    if tensor.sqnr_db is None:
        return tensor.detail
    expected = "exact" if tensor.expected_db is None else f"about {tensor.expected_db:.0f} dB"
    figures = f"SQNR {tensor.sqnr_db:.1f} dB, expected {expected}"
    return f"{figures}; {tensor.detail}" if tensor.detail else figures


def _with_operators(faults: list[Fault], evidence: Evidence, entry: Rung | None) -> list[Fault]:
    """Adds wrong steps: to the fault that explains them, else as faults of their own."""
    faults = list(faults)
    own: dict[tuple[str, bool], list[OperatorError]] = {}
    rotated_wrongly: set[int | None] = set()
    for operator in evidence.operators:
        if not operator.is_fault:
            continue
        component = operator.component.partition(" (")[0]
        if component == "self_attn.rotary":
            rotated_wrongly.add(operator.layer)
        explained = _explaining(faults, component, operator.layer, evidence.graph_stage)
        if explained is not None:
            fault = faults[explained]
            line = f"{operator.place}: {_operator_message([operator])}"
            faults[explained] = replace(fault, evidence=(*fault.evidence, line))
        elif component != "self_attn.attention" or operator.layer not in rotated_wrongly:
            own.setdefault((component, operator.relative_error is None), []).append(operator)
    for (component, _), found in own.items():
        layers = tuple(operator.layer for operator in found if operator.layer is not None)
        stage = _running_stage(evidence, entry)
        faults.append(Fault(stage, component, layers, _operator_message(found)))
    return faults


def _explaining(
    faults: Sequence[Fault], component: str, layer: int | None, graph_stage: str
) -> int | None:
    """The finding that a wrong step follows from."""
    causes = {component, *_CAUSES.get(component, ())}
    for index, fault in enumerate(faults):
        if fault.stage != graph_stage or fault.component not in causes:
            continue
        if layer is None or not fault.layers or layer in fault.layers:
            return index
    return None


def _operator_message(operators: Sequence[OperatorError]) -> str:
    worst = max(
        operators, key=lambda o: float("inf") if o.relative_error is None else o.relative_error
    )
    if worst.relative_error is None:
        return worst.detail
    return (
        f"relative error {worst.relative_error:.2g} on its own input, at most "
        f"{worst.tolerance:.0e} is rounding"
    )


def _unexplained_blocks(faults: Sequence[Fault], evidence: Evidence) -> list[Fault]:
    """Blocks whose error neither their weights nor a fault explain."""
    found: list[Fault] = []
    touched = {
        (layer, fault.component.partition(".")[0]) for fault in faults for layer in fault.layers
    }
    norms = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
    for layer in evidence.layers:
        for block, prefix in _BLOCKS.items():
            error: float | None = getattr(layer, block)
            known = {(layer.layer, prefix), (layer.layer, norms[block])}
            if error is None or known & touched:
                continue
            limit = _explained_error(evidence, layer.layer, prefix)
            if limit is not None and error > limit:
                message = (
                    f"its contribution is off by {error:.2g} on its own input, its weights and "
                    f"types explain at most {limit:.2g}"
                )
                found.append(Fault(evidence.graph_stage, prefix, (layer.layer,), message))
    return found


def _explained_error(evidence: Evidence, layer: int, prefix: str) -> float | None:
    """The greatest relative error of a block that the errors of its weights and types explain."""
    energy = 0.0
    for tensor in evidence.tensors:
        if tensor.layer != layer or not tensor.component.startswith(prefix):
            continue
        if tensor.status == "unreadable":
            return None
        if tensor.sqnr_db is not None:
            energy += 10 ** (-tensor.sqnr_db / 10)
    tolerances = [o.tolerance for o in evidence.operators if o.layer == layer]
    return float(_AMPLIFICATION * energy**0.5 + _ACCUMULATED * max(tolerances, default=1e-3))
