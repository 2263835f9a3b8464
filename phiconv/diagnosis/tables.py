"""A diagnosis as tables of text, for a terminal or a document; nothing here prints."""

from __future__ import annotations

from dataclasses import dataclass

from phiconv.diagnosis.results import Diagnosis, OperatorError, TensorError

_SHOWN = 12
_NONE = "-"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: What it shows.
        columns: The headings; a heading that ends in ` >` stands over a column of figures.
        rows: The cells, as many as headings.
        note: What was left out, if anything.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(diagnosis: Diagnosis, *, shown: int = _SHOWN) -> tuple[Table, ...]:
    """What to show of a diagnosis beside its verdict: only tables that have rows.

    Args:
        diagnosis: What to show.
        shown: Weights and steps shown at most, the worst first; every faulty one is shown.
    """
    made = (
        _faults(diagnosis),
        _ladder(diagnosis),
        _layers(diagnosis),
        _tensors(diagnosis, shown),
        _operators(diagnosis, shown),
        _findings(diagnosis),
    )
    return tuple(table for table in made if table.rows)


def _faults(diagnosis: Diagnosis) -> Table:
    rows = tuple(
        (fault.stage, fault.place, "; ".join((fault.message, *fault.evidence)))
        for fault in diagnosis.faults
    )
    return Table("Faults", ("stage", "place", "what"), rows)


def _ladder(diagnosis: Diagnosis) -> Table:
    rows = []
    for rung in diagnosis.ladder:
        name = rung.stage if rung.on_path else f"({rung.stage})"
        figures = (rung.kl_mean, rung.kl_max, rung.logit_error_max)
        top1 = _NONE if rung.top1_agreement is None else f"{rung.top1_agreement:.1%}"
        cells = (*map(_figure, figures), top1, _figure(rung.perplexity_ratio, 4))
        rows.append((name, *cells, rung.note or rung.description))
    columns = ("stage", "mean KL >", "max KL >", "max logit error >", "top-1 >", "perplexity x >")
    return Table("Ladder", (*columns, "what is computed"), tuple(rows))


def _layers(diagnosis: Diagnosis) -> Table:
    rows = []
    for layer in diagnosis.layers:
        name = "embedding" if layer.layer < 0 else str(layer.layer)
        figures = (layer.inherited, layer.relative_error, layer.added, layer.attention, layer.mlp)
        rows.append((name, *map(_figure, figures)))
    columns = ("layer", "error before >", "error after >", "added >", "attention >", "MLP >")
    return Table("Residual stream", columns, tuple(rows))


def _tensors(diagnosis: Diagnosis, shown: int) -> Table:
    ordered = sorted(diagnosis.tensors, key=_tensor_rank)
    count = max(shown, sum(tensor.is_fault for tensor in ordered))
    rows = tuple(
        (
            tensor.place,
            tensor.format,
            _decibels(tensor.sqnr_db, tensor),
            _decibels(tensor.expected_db, tensor),
            f"{tensor.status}: {tensor.detail}" if tensor.detail else tensor.status,
        )
        for tensor in ordered[:count]
    )
    columns = ("weight", "format", "SQNR dB >", "expected dB >", "status")
    return Table("Weights", columns, rows, _left_out(len(ordered), count, "weights"))


def _tensor_rank(tensor: TensorError) -> tuple[bool, float]:
    """Faults first, then what is furthest below its expectation."""
    if tensor.sqnr_db is None or tensor.expected_db is None:
        margin = float("inf") if tensor.sqnr_db is None else tensor.sqnr_db
    else:
        margin = tensor.sqnr_db - tensor.expected_db
    return not tensor.is_fault, margin


def _operators(diagnosis: Diagnosis, shown: int) -> Table:
    ordered = sorted(diagnosis.operators, key=_operator_rank)
    count = max(shown, sum(operator.is_fault for operator in ordered))
    rows = tuple(
        (
            operator.place,
            _figure(operator.relative_error),
            _figure(operator.tolerance),
            _figure(operator.largest),
            operator.detail or ("wrong" if operator.is_fault else "ok"),
        )
        for operator in ordered[:count]
    )
    columns = ("step", "error >", "tolerance >", "largest value >", "status")
    return Table("Steps", columns, rows, _left_out(len(ordered), count, "steps"))


def _operator_rank(operator: OperatorError) -> float:
    """The share of its tolerance that a step uses, the greatest first."""
    if operator.relative_error is None:
        return -float("inf")
    return -operator.relative_error / operator.tolerance


def _findings(diagnosis: Diagnosis) -> Table:
    rows = []
    for finding in diagnosis.findings:
        layers = ", ".join(map(str, finding.layers)) or _NONE
        rows.append((finding.severity, finding.component, layers, finding.message))
    return Table("Graph against config.json", ("severity", "part", "layers", "what"), tuple(rows))


def _figure(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:.{digits}g}"


def _decibels(value: float | None, tensor: TensorError) -> str:
    compared = tensor.status in ("ok", "rescaled") or tensor.sqnr_db is not None
    if value is None:
        return "exact" if compared else _NONE
    return f"{value:.1f}"


def _left_out(total: int, shown: int, what: str) -> str:
    return f"{total - shown} more {what} are no worse" if total > shown else ""
