"""What a validation looks at besides the logits: nodes, kernels, graph, tokenizer, config.

Each check gives a `Check` for the reports and the counts that gates judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.report.results import Check, CheckState

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis import Finding, TensorError
    from phiconv.diagnosis.weight_part import WeightPart
    from phiconv.parity.results import ParityReport
    from phiconv.report.results import Provenance
    from phiconv.runtimes.kernel_support import KernelFinding
    from phiconv.runtimes.providers import Provider
    from phiconv.stages.stage import Progress

_KEPT = 40  # findings of one check that a report lists
# GPTQ of a checkpoint with outlier channels, not scaled before, is up to 9.5 dB noisier than plain
# rounding; a zero point that is off by one, 13 dB.
_MEANT_DB = 11.0
_PARITY = ("tokenizer", "chat template", "genai_config")


@dataclass(frozen=True)
class Checked:
    """Checks, and metric name -> how many errors they found."""

    checks: tuple[Check, ...]
    counts: Mapping[str, float]

    @contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Says along with a StageError raised inside which errors were found before."""
        try:
            yield
        except StageError as error:
            found = [check for check in self.checks if check.state == "errors"]
            found.sort(key=lambda check: check.name == "kernels")  # often follows from the others
            lines = [line for check in found for line in check.findings]
            if lines:
                more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
                error.message = f"{error.message}; found without running it: {lines[0]}{more}"
            raise


def check_statically(
    folder: Path, checkpoint: Checkpoint, provider: Provider, target: str
) -> Checked:
    """Every check that runs no model.

    Args:
        folder: The artifact.
        checkpoint: What it was made from.
        provider: What the recipe validates for.
        target: The same by ONNX Runtime's name.

    Raises:
        StageError: The artifact holds no ONNX model.
        CheckpointError: The checkpoint's own tokenizer cannot be read.
    """
    return joined(
        [
            check_kernels(folder, target),
            check_wiring(folder, checkpoint),
            check_parity(folder, checkpoint, provider),
        ]
    )


def joined(parts: Sequence[Checked]) -> Checked:
    """Several in one."""
    checks = tuple(check for part in parts for check in part.checks)
    return Checked(checks, {name: count for part in parts for name, count in part.counts.items()})


def check_kernels(folder: Path, target: str) -> Checked:
    """Whether the target provider has a kernel for every node, without running any.

    Raises:
        StageError: The artifact holds no ONNX model.
    """
    from phiconv.runtimes.kernel_support import check_graph
    from phiconv.runtimes.onnxruntime import model_file
    from phiconv.runtimes.placement import does_the_work

    found = check_graph(model_file(folder), target)
    grave = [
        finding
        for finding in found
        if finding.severity == "unsupported"
        or (finding.severity == "falls back to CPU" and does_the_work(finding.op))
    ]
    rest = [finding for finding in found if finding not in grave]
    check = Check(
        "kernels",
        _state(grave, [f for f in rest if f.severity != "note"]),
        _kernel_summary(target, grave, rest),
        _listed([*grave, *rest]),
        ("kernels.unserved",),
    )
    return Checked((check,), {"kernels.unserved": float(len(grave))})


def _kernel_summary(
    target: str, grave: Sequence[KernelFinding], rest: Sequence[KernelFinding]
) -> str:
    check = f"static {target} kernel check"
    if grave:
        nodes = _counted(len(grave), "node")
        return f"{check} found {nodes} that it cannot run or leaves to the CPU"
    on_cpu = sum(finding.severity == "falls back to CPU" for finding in rest)
    but = f", {_counted(on_cpu, 'small node')} left to the CPU" if on_cpu else ""
    return f"{check}, nothing amiss{but}"


def check_wiring(folder: Path, checkpoint: Checkpoint) -> Checked:
    """Whether attributes, constants and connections of the graph are those of config.json."""
    from phiconv.diagnosis.diagnose import lint_artifact

    return _check_graph(lambda: lint_artifact(folder, checkpoint.config))


def check_metadata(artifact: Path, checkpoint: Checkpoint) -> Checked:
    """Whether the metadata of a GGUF file, which its graph is made from, is the checkpoint's."""
    from phiconv.diagnosis.gguf_lint import lint_gguf
    from phiconv.runtimes.llama_cpp import gguf_file

    return _check_graph(lambda: lint_gguf(gguf_file(artifact), checkpoint))


def _check_graph(lint: Callable[[], Sequence[Finding]]) -> Checked:
    name, metric = "graph", "graph.faults"
    try:
        found = lint()
    except StageError as error:
        return Checked((Check(name, "not_checked", f"cannot be read: {error.message}"),), {})
    errors = [finding for finding in found if finding.severity == "error"]
    warnings = [finding for finding in found if finding.severity == "warning"]
    lines = [
        f"{item.severity}: {item.check} of {item.component}{_layers(item.layers)}: {item.message}"
        for item in (*errors, *warnings)
    ]
    counts = f"{_counted(len(errors), 'error')}, {_counted(len(warnings), 'warning')}"
    check = Check(
        name,
        _state(errors, warnings),
        counts if found else "agrees with config.json",
        _listed(lines),
        (metric,),
    )
    return Checked((check,), {metric: float(len(errors))})


def check_weights(
    parts: Callable[[], Sequence[WeightPart]],
    checkpoint: Checkpoint,
    *,
    threads: int,
    progress: Progress,
) -> Checked:
    """Whether every weight is the checkpoint's, as near as its format allows.

    What no text of a measurement shows is found here: a row of a rare token, a scale with one bit
    flipped. What logits decide is not counted: a weight that is noisier than its format explains
    may have been rounded with an eye to the output; and where most weights are unlike the
    checkpoint's, the artifact is another model's, or its weights were rotated.

    Args:
        parts: Finds the artifact's weights.
        checkpoint: What it was made from.
        threads: How many weights are compared at once; does not change the result.
        progress: Told which weights are done.
    """
    from phiconv.diagnosis.sqnr import tensor_errors
    from phiconv.diagnosis.verdict import of_another_model, weight_faults

    def advance(_: int, place: str) -> None:
        progress.advance(0, f"weights: {place}")

    name, metric = "weights", "weights.faults"
    try:
        found = tensor_errors(parts(), checkpoint, threads=threads, advance=advance)
    except StageError as error:
        return Checked((Check(name, "not_checked", f"cannot be read: {error.message}"),), {})
    noisy = weight_faults([error for error in found if _may_be_meant(error)], name)
    faults = weight_faults([error for error in found if not _may_be_meant(error)], name)
    unread = [
        f"{tensor.place}: {tensor.detail}" for tensor in found if tensor.status == "unreadable"
    ]
    strange = sum(tensor.status == "wrong" for tensor in found)
    if of_another_model(found) and strange > len(faults) // 2:
        summary = (
            f"{strange} of {len(found)} are unlike the checkpoint's: another model's, or rotated"
        )
        return Checked((Check(name, "warnings", summary),), {})
    summary = f"{_counted(len(found) - len(unread), 'weight')} compared with the checkpoint's"
    if faults:
        summary += f", {_counted(len(faults), 'fault')}"
    if noisy:
        summary += f", {len(noisy)} noisier than the format explains"
    if unread:
        summary += f", {len(unread)} stored in a way that is not read"
    errors = [f"error: {fault.place}: {fault.message}" for fault in faults]
    warnings = [*(f"{fault.place}: {fault.message}" for fault in noisy), *unread]
    lines = [*errors, *(f"warning: {warning}" for warning in warnings)]
    check = Check(name, _state(faults, warnings), summary, _listed(lines), (metric,))
    return Checked((check,), {metric: float(len(faults))})


def _may_be_meant(error: TensorError) -> bool:
    """Whether a weight is noisy as rounding with an eye to the output may make it."""
    if error.status != "low" or error.sqnr_db is None or error.expected_db is None:
        return False
    return error.expected_db - error.sqnr_db < _MEANT_DB


def _layers(layers: Sequence[int]) -> str:
    if not layers:
        return ""
    noun = "layer" if len(layers) == 1 else "layers"
    return f" in {noun} {', '.join(map(str, layers))}"


def check_placement(provenance: Provenance) -> Checked:
    """Whether MatMul and attention nodes were on the provider in use."""
    strays, placement = provenance.strays, provenance.placement
    used_first = sorted(placement.items(), key=lambda item: item[0] != provenance.provider)
    counts = [
        f"{_counted(sum(operators.values()), 'node')} on {provider}"
        for provider, operators in used_first
    ]
    where = ", ".join(counts)
    if strays:
        count = _counted(len(strays), "MatMul or attention node")
        summary = f"{count} fell back from {provenance.provider}; {where}"
    elif len(placement) > 1:
        summary = f"{counts[0]}; {', '.join(counts[1:])}, none of them MatMul or attention"
    else:
        summary = where or f"every node on {provenance.provider}, the only provider"
    metric = "placement.fallback"
    check = Check("placement", _state(strays, ()), summary, _listed(strays), (metric,))
    return Checked((check,), {metric: float(len(strays))})


def check_parity(folder: Path, checkpoint: Checkpoint, provider: Provider) -> Checked:
    """Tokenizer, chat template and genai_config.json against the checkpoint's.

    Raises:
        CheckpointError: The checkpoint's own tokenizer or generation config cannot be read.
    """
    from phiconv.parity.check import check_artifact

    # an artifact for a GPU may well be measured on the CPU, too
    builds_for = None if provider == "cpu" else provider
    try:
        report = check_artifact(folder, checkpoint, provider=builds_for)
    except EnvironmentLacksError as error:
        checks = tuple(Check(name, "not_checked", error.message) for name in _PARITY)
        return Checked(checks, {})
    checks = (_tokenizer(report), _template(report), _config(report))
    return Checked(checks, report.metrics())


def check_gguf(folder: Path, checkpoint: Checkpoint) -> Checked:
    """Metadata, tokenizer and chat template of a GGUF file against the checkpoint's.

    Raises:
        CheckpointError: The checkpoint's own tokenizer cannot be read.
    """
    return joined([check_metadata(folder, checkpoint), check_gguf_parity(folder, checkpoint)])


def check_gguf_parity(folder: Path, checkpoint: Checkpoint) -> Checked:
    """Tokenizer and chat template of a GGUF file, as llama.cpp has them, against the checkpoint's.

    Raises:
        CheckpointError: The checkpoint's own tokenizer cannot be read.
    """
    from phiconv.parity.llama_cpp import gguf_parity

    names = ("tokenizer", "chat template")
    try:
        report = gguf_parity(folder, checkpoint.path)
    except EnvironmentLacksError as error:
        message = f"{error.message}; what is measured is the weights, not the runtime"
        return Checked(tuple(Check(name, "not_checked", message) for name in names), {})
    counts = report.metrics()
    del counts["parity.genai_config"]
    return Checked((_tokenizer(report), _template(report)), counts)


def _tokenizer(report: ParityReport) -> Check:
    found = report.tokenizer
    errors = found.error_count + (found.failure is not None)
    compared = (
        f"{_counted(found.texts, 'golden text')} and {found.tokens} vocabulary entries compared"
    )
    if found.failure is not None:
        summary = found.failure
    elif errors:
        summary = f"{compared}, {errors} differ"
    else:
        summary = f"{compared}, no unexplained difference"
    if found.warning_count:
        summary += f", {found.warning_count} by known limitations of the runtime"
    return Check(
        "tokenizer",
        _state(range(errors), range(found.warning_count)),
        summary,
        _listed([*filter(None, [found.failure]), *found.differences]),
        ("parity.tokenizer", "parity.runtime_limitations"),
    )


def _template(report: ParityReport) -> Check:
    found = report.template
    warnings = [item for item in found.differences if item.severity == "warning"]
    if found.failure is not None:
        summary = found.failure
    elif found.conversations:
        compared = f"{_counted(found.conversations, 'conversation')} compared"
        summary = f"{compared}, {_counted(found.error_count, 'difference')}"
    else:
        summary = "the checkpoint has none"
    if warnings:
        summary += f", {len(warnings)} by known limitations of the runtime"
    return Check(
        "chat template",
        _state(range(found.error_count), warnings),
        summary,
        _listed([*filter(None, [found.failure]), *found.differences]),
        ("parity.template",),
    )


def _config(report: ParityReport) -> Check:
    errors = [item for item in report.findings if item.severity == "error"]
    warnings = [item for item in report.findings if item.severity == "warning"]
    counts = f"{_counted(len(errors), 'error')}, {_counted(len(warnings), 'warning')}"
    return Check(
        "genai_config",
        _state(errors, warnings),
        counts if report.findings else "agrees with the checkpoint and the graph",
        _listed(report.findings),
        ("parity.genai_config",),
    )


def _state(errors: Sequence[object], warnings: Sequence[object]) -> CheckState:
    return "errors" if errors else "warnings" if warnings else "clean"


def _listed(findings: Iterable[object]) -> tuple[str, ...]:
    lines = [str(finding) for finding in findings]
    more = len(lines) - _KEPT
    return (*lines[:_KEPT], f"and {more} more") if more > 0 else tuple(lines)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
