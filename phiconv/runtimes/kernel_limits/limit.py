"""The form of a limit, and the limits that many operators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"

Effect = Literal["declined", "refused", "misread"]
"""What a provider does beyond a limit: it leaves the node to the CPU provider; it takes it and
fails when the session is made or run; or it runs it and computes something else."""


@dataclass(frozen=True)
class OperatorNode:
    """A node with the element types of its values.

    Attributes:
        node: The node.
        domain: Its operator's domain, `ai.onnx` for the default one.
        inputs: Types of its inputs; None for an absent input and for an unknown type.
        outputs: Types of its outputs, likewise.
    """

    node: ir.Node
    domain: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]

    def attribute(self, name: str, default: Any) -> Any:
        """Value of an attribute, `default` without it."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None or attribute.is_ref() else attribute.value

    def has_input(self, index: int) -> bool:
        """Whether an (optional) input is given."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        # absent is None, or a value with an empty name where the model builder made the graph
        return value is not None and value.name != ""

    def has_output(self, index: int) -> bool:
        """Whether an (optional) output is asked for."""
        return index < len(self.node.outputs) and self.node.outputs[index].name != ""

    def type_of(self, index: int) -> str | None:
        """Type of an input; None if it is absent or unknown."""
        return self.inputs[index] if index < len(self.inputs) else None

    def shape(self, index: int) -> tuple[int | None, ...] | None:
        """Shape of an input, None for an unknown dimension; None if the rank is unknown."""
        value = self.node.inputs[index] if self.has_input(index) else None
        if value is None or value.shape is None:
            return None
        return tuple(dim if isinstance(dim, int) else None for dim in value.shape)

    def dim(self, index: int, axis: int) -> int | None:
        """One dimension of an input, None if it is unknown."""
        shape = self.shape(index)
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        return shape[axis]


Problem = Callable[[OperatorNode], str | None]
"""Says what about a node is beyond a limit; None if nothing is."""


@dataclass(frozen=True)
class Limit:
    """A limit of the kernels of some providers for some operators.

    Attributes:
        providers: Whose kernels.
        domain: The operators' domain; `*` for all.
        operators: The operators; none for all.
        effect: What the provider does with a node beyond the limit.
        source: File and function in which it was read, relative to the folder onnxruntime/.
        problem: What is beyond the limit.
    """

    providers: tuple[str, ...]
    domain: str
    operators: tuple[str, ...]
    effect: Effect
    source: str
    problem: Problem

    def applies(self, provider: str, node: OperatorNode) -> bool:
        """Whether it is about this provider and operator."""
        return (
            provider in self.providers
            and self.domain in ("*", node.domain)
            and (not self.operators or node.node.op_type in self.operators)
        )


def one_of(name: str, *allowed: Any, default: Any) -> Problem:
    """The attribute must have an allowed value."""

    def problem(node: OperatorNode) -> str | None:
        value = node.attribute(name, default)
        if value in allowed:
            return None
        return f"{name}={value}, not {' or '.join(str(item) for item in allowed)}"

    return problem


def unread(name: str, neutral: Any) -> Problem:
    """The kernel never looks at the attribute, which must have its neutral value."""

    def problem(node: OperatorNode) -> str | None:
        value = node.attribute(name, neutral)
        return None if value == neutral else f"{name}={value} is ignored"

    return problem


def without_input(index: int, name: str) -> Problem:
    """The optional input must be absent."""
    return lambda node: f"it has the input {name}" if node.has_input(index) else None


def without_output(index: int, name: str) -> Problem:
    """The optional output must be absent."""
    return lambda node: f"it has the output {name}" if node.has_output(index) else None


def together(first: int, second: int, names: str) -> Problem:
    """Two inputs must be both given or both absent."""

    def problem(node: OperatorNode) -> str | None:
        if node.has_input(first) == node.has_input(second):
            return None
        return f"only one of {names} is given"

    return problem
