"""Checks an ONNX graph, without running it, against the kernels an execution provider has.

So a graph for CUDA or DirectML can be checked on a machine with neither. ONNX Runtime gives a node
to the CPU provider when the preferred one has no kernel for its operator, opset and types, and
refuses the model when the CPU provider has none either. Which kernels there are says a table
distilled from ONNX Runtime's documentation (`phiconv.runtimes.kernel_table`), what they do not do
`phiconv.runtimes.kernel_limits`. What this cannot tell: docs/provider-support.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phiconv.errors import StageError
from phiconv.machine import CPU
from phiconv.runtimes.function_bodies import function_body
from phiconv.runtimes.kernel_limits import LIMITS, OperatorNode
from phiconv.runtimes.kernel_table import (
    DEFAULT_DOMAIN,
    Kernel,
    Parameter,
    Signature,
    kernel_table,
)
from phiconv.runtimes.value_types import parameter_at, subgraphs, value_types

if TYPE_CHECKING:
    import onnx_ir as ir

Severity = Literal["unsupported", "falls back to CPU", "note"]
"""`unsupported`: the model does not load or does not run, or a kernel ignores part of the node.
`falls back to CPU`: the model runs, but this node on the CPU, its values copied there and back.
`note`: the model runs well, or what becomes of the node is not known."""

SEVERITIES: tuple[Severity, ...] = ("unsupported", "falls back to CPU", "note")
# They read shapes, never values.
_SHAPE_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class KernelFinding:
    """A node that a provider's kernels do not serve.

    Attributes:
        node: Name of the node, or of its first output where it has none.
        op: Operator type.
        domain: Operator domain, `ai.onnx` for the default one.
        opset: Version of the domain that the model imports; 0 if it imports none.
        reason: What is missing, and for a limit of a kernel the source it was read in.
        severity: What follows.
    """

    node: str
    op: str
    domain: str
    opset: int
    reason: str
    severity: Severity

    def __str__(self) -> str:
        return f"{self.severity}: {self.op} {self.node} ({self.domain} {self.opset}): {self.reason}"


def check_graph(model: ir.Model | Path | str, provider: str) -> list[KernelFinding]:
    """Finds the nodes that an execution provider has no kernel for, subgraphs included.

    Nothing is executed and no weight is read.

    Args:
        model: A model, or an .onnx file.
        provider: CPUExecutionProvider, CUDAExecutionProvider or DmlExecutionProvider.

    Returns:
        Findings in graph order; none if the graph is all right as far as this can tell.

    Raises:
        StageError: The file is no ONNX model, or the provider is not in the table.
    """
    if provider not in kernel_table().providers:
        known = ", ".join(kernel_table().providers)
        raise StageError(f"no table of the kernels of {provider}, only of {known}")
    if isinstance(model, Path | str):
        model = _load(Path(model))
    return list(_Check(model, provider).findings(model.graph))


def _load(path: Path) -> ir.Model:
    import onnx_ir as ir
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return ir.load(path)
    except (OSError, ValueError, DecodeError) as error:
        raise StageError(f"not an ONNX model: {error}", where=str(path)) from error


@dataclass(frozen=True)
class _Obstacle:
    """Why a node does not run as meant on a provider; `passed_on` if the CPU provider gets it."""

    reason: str
    passed_on: bool


class _Check:
    """A model being checked for one provider."""

    def __init__(self, model: ir.Model, provider: str):
        self._provider = provider
        self._opsets = {
            domain or DEFAULT_DOMAIN: opset for domain, opset in model.opset_imports.items()
        }
        self._functions = {(domain, name) for domain, name, _ in model.functions}
        self._types = value_types(model.graph, self._signature)

    def findings(self, graph: ir.Graph) -> Iterator[KernelFinding]:
        for node in graph:
            verdict = self._judge(node)
            if verdict is not None:
                domain = node.domain or DEFAULT_DOMAIN
                name = node.name or next((value.name for value in node.outputs), None) or ""
                opset = self._opsets.get(domain, 0)
                yield KernelFinding(name, node.op_type, domain, opset, *verdict)
            for subgraph in subgraphs(node):
                yield from self.findings(subgraph)

    def _judge(self, node: ir.Node) -> tuple[str, Severity] | None:
        """Reason and severity of what is wrong with a node."""
        operator = self._operator(node)
        if node.op_type == "Constant" and operator.domain == DEFAULT_DOMAIN:
            return None  # an initializer by the time nodes are placed
        if (node.domain, node.op_type) in self._functions:
            return "a function of this model, whose nodes are not checked: inline it", "note"
        signature = self._signature(node)
        if signature is None:
            return "ONNX Runtime has no such operator", "unsupported"
        conflict = _conflict(operator, signature)
        if conflict is not None:
            return conflict, "unsupported"
        obstacle = _obstacle(operator, signature, self._provider)
        if obstacle is None:
            return self._untyped(node)
        if not obstacle.passed_on:
            return obstacle.reason, "unsupported"
        return self._on_cpu(operator, signature, obstacle.reason)

    def _on_cpu(
        self, operator: OperatorNode, signature: Signature, reason: str
    ) -> tuple[str, Severity]:
        """What becomes of a node that the provider does not take for `reason`.

        As ONNX Runtime does: the CPU provider takes it; or what ONNX defines it by takes its
        place; or InsertCastTransformer casts it from float16 to float, for the CPU provider.
        """
        on_cpu = _obstacle(operator, signature, CPU)
        if on_cpu is not None and on_cpu.passed_on:
            expanded = self._expanded(operator, signature, reason)
            if expanded is not None:
                return expanded
            if _obstacle(_in_float(operator), signature, CPU) is None:
                on_cpu, reason = None, f"{reason}; ONNX Runtime casts it to float on the CPU"
                if self._provider == CPU:
                    return reason, "note"
        if on_cpu is None:
            return reason, "note" if _on_host_anyway(operator) else "falls back to CPU"
        return reason if self._provider == CPU else f"{reason}; {on_cpu.reason}", "unsupported"

    def _expanded(
        self, operator: OperatorNode, signature: Signature, reason: str
    ) -> tuple[str, Severity] | None:
        """What becomes of the operators that ONNX defines a node's operator by, if it does."""
        if not signature.function:
            return None
        body = function_body(operator.node, self._opsets[DEFAULT_DOMAIN], operator.inputs)
        if body is None:
            return None
        self._types |= value_types(body, self._signature)
        found = sorted(self.findings(body), key=lambda finding: SEVERITIES.index(finding.severity))
        if not found:
            return f"{reason}; it runs as other operators", "note"
        return f"{reason}; it runs as other operators: {found[0].reason}", found[0].severity

    def _untyped(self, node: ir.Node) -> tuple[str, Severity] | None:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        unknown = [value.name for value in values if value.name and not self._types.get(value)]
        if not unknown or next(subgraphs(node), None) is not None:
            return None
        return f"the types of {', '.join(unknown)} are not known", "note"

    def _signature(self, node: ir.Node) -> Signature | None:
        domain = node.domain or DEFAULT_DOMAIN
        return kernel_table().signature(domain, node.op_type, self._opsets.get(domain, 0))

    def _operator(self, node: ir.Node) -> OperatorNode:
        inputs = (self._types.get(value) if value is not None else None for value in node.inputs)
        outputs = (self._types.get(value) for value in node.outputs)
        return OperatorNode(node, node.domain or DEFAULT_DOMAIN, tuple(inputs), tuple(outputs))


def _obstacle(operator: OperatorNode, signature: Signature, provider: str) -> _Obstacle | None:
    """Why a node does not run as meant on a provider: no kernel, or one with a limit."""
    missing = _no_kernel(operator, signature, provider)
    if missing is not None:
        return _Obstacle(missing, passed_on=True)
    for limit in LIMITS:
        problem = limit.problem(operator) if limit.applies(provider, operator) else None
        if problem is not None:
            reason = f"{provider}: {problem} ({limit.source})"
            return _Obstacle(reason, passed_on=limit.effect == "declined")
    return None


def _no_kernel(operator: OperatorNode, signature: Signature, provider: str) -> str | None:
    """Why a provider has no kernel for a node; None if it has one."""
    op = operator.node.op_type
    kernels = kernel_table().kernels(provider, operator.domain, op)
    if not kernels:
        return f"{provider} has no {op}"
    fitting = [kernel for kernel in kernels if kernel.takes(signature.version)]
    if not fitting:
        opsets = ", ".join(kernel.opsets for kernel in reversed(kernels))
        return f"{provider} has {op} of opset {opsets}, not of {signature.version}"
    reasons = [_wrong_type(kernel, operator, signature) for kernel in fitting]
    return None if None in reasons else f"{provider} has {op} only {reasons[0]}"


def _wrong_type(kernel: Kernel, operator: OperatorNode, signature: Signature) -> str | None:
    """Which value of a node has a type that a kernel does not take; None if none is known to."""
    for parameter, kind in _bindings(operator, signature):
        for constraint in (parameter.constraint, parameter.name):
            types = kernel.types.get(constraint)
            if types is not None and kind not in types:
                return f"with {parameter.name} of {', '.join(sorted(types))}, not {kind}"
    return None


def _conflict(operator: OperatorNode, signature: Signature) -> str | None:
    """Two values of a node that must have one type and do not; ONNX Runtime loads no such model."""
    bound: dict[str, tuple[str, str]] = {}
    for parameter, kind in _bindings(operator, signature):
        if parameter.type not in (None, kind):
            return f"{parameter.name} is {kind}, not {parameter.type}"
        if parameter.uniform:
            first, name = bound.setdefault(parameter.constraint, (kind, parameter.name))
            if kind != first:
                return f"{parameter.name} is {kind} and {name} is {first}, which must be the same"
    return None


def _bindings(operator: OperatorNode, signature: Signature) -> Iterator[tuple[Parameter, str]]:
    """The formal parameter and the type of each value of a node whose type is known."""
    sides = ((signature.inputs, operator.inputs), (signature.outputs, operator.outputs))
    for parameters, types in sides:
        for index, kind in enumerate(types):
            parameter = parameter_at(parameters, index)
            if parameter is not None and kind is not None:
                yield parameter, kind


def _in_float(operator: OperatorNode) -> OperatorNode:
    """The node after casts from and to float16 were put around it."""

    def cast(types: tuple[str | None, ...]) -> tuple[str | None, ...]:
        return tuple("float" if kind == "float16" else kind for kind in types)

    return replace(operator, inputs=cast(operator.inputs), outputs=cast(operator.outputs))


def _on_host_anyway(operator: OperatorNode) -> bool:
    """Whether ONNX Runtime rather has a node on the CPU: shapes, lengths, masks, control flow."""
    types = {*operator.inputs, *operator.outputs} - {None}
    return (
        operator.node.op_type in _SHAPE_READERS
        or next(subgraphs(operator.node), None) is not None
        or not any(kind == "double" or "float" in str(kind) for kind in types)
    )
