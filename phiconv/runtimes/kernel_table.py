"""Which operators ONNX Runtime's execution providers have kernels for, opset by type.

The data is phiconv/data/operator_kernels.json, distilled from ONNX Runtime's
docs/OperatorKernels.md by docs/operator_kernels.py. Operators are defined by the onnx package,
and by the table for those that ONNX Runtime added (com.microsoft, SimplifiedLayerNormalization).

Types are ONNX's names of tensor element types: float, float16, bfloat16, double, int64, uint8...
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

TABLE_FILE = "operator_kernels.json"
FORMAT = 1
DEFAULT_DOMAIN = "ai.onnx"


@dataclass(frozen=True)
class Kernel:
    """Kernels of one operator that were registered for one range of opsets.

    Attributes:
        since: First opset.
        until: Last opset; None where the registration gives none.
        types: Types by type constraint, or by parameter where the kernel constrains only that one.
            A float and a float16 kernel are one entry with both types, as in the document.
    """

    since: int
    until: int | None
    types: Mapping[str, frozenset[str]]

    def takes(self, version: int) -> bool:
        """Whether it serves an operator that was last changed in opset `version`.

        As `VerifyVersion` in ONNX Runtime's core/framework/kernel_registry.cc: without a last
        opset a kernel serves nothing but the version it was written for.
        """
        if self.until is None:
            return version == self.since
        return self.since <= version <= self.until

    @property
    def opsets(self) -> str:
        """The range in words, such as `13` or `6-12`."""
        last = self.since if self.until is None else self.until
        return str(self.since) if last == self.since else f"{self.since}-{last}"


@dataclass(frozen=True)
class Parameter:
    """A formal input or output of an operator.

    Attributes:
        name: Its name.
        constraint: Its type constraint, such as `T`, or a type, such as `tensor(int64)`.
        type: The type where the operator allows only one.
        uniform: False for a variadic parameter whose values may differ in type.
    """

    name: str
    constraint: str
    type: str | None
    uniform: bool = True


@dataclass(frozen=True)
class Signature:
    """An operator as of one opset.

    Attributes:
        version: Opset in which it was last changed.
        inputs: Formal inputs; the last one takes all further values.
        outputs: Formal outputs, likewise.
        function: Whether it is one of ai.onnx that ONNX defines by others, which ONNX Runtime
            runs in its place where there is no kernel.
    """

    version: int
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    function: bool = False


@dataclass(frozen=True)
class KernelTable:
    """The table and where it comes from.

    Attributes:
        version: Version of ONNX Runtime that the document describes.
        commit: Commit of microsoft/onnxruntime it was taken from.
        sha256: Digest of the document.
    """

    version: str
    commit: str
    sha256: str
    _kernels: Mapping[str, Mapping[str, Mapping[str, Any]]]
    _signatures: Mapping[str, Mapping[str, Any]]
    _types: tuple[frozenset[str], ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """The operator domains it covers."""
        return tuple(sorted({domain for domains in self._kernels.values() for domain in domains}))

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers it covers."""
        return tuple(self._kernels)

    def operators(self, provider: str, domain: str) -> tuple[str, ...]:
        """The operators of a domain that a provider has kernels for."""
        return tuple(self._kernels[provider].get(domain, {}))

    def kernels(self, provider: str, domain: str, op: str) -> tuple[Kernel, ...]:
        """Kernels of a provider for an operator, newest first; none if it has none."""
        rows = self._kernels[provider].get(domain, {}).get(op, [])
        return tuple(
            Kernel(
                row["since"],
                row["until"],
                {name: self._types[index] for name, index in row["types"].items()},
            )
            for row in rows
        )

    def signature(self, domain: str, op: str, opset: int) -> Signature | None:
        """An operator of an opset; None if neither ONNX nor ONNX Runtime has it there."""
        own = self._signatures.get(domain, {}).get(op)
        defined = _onnx_signature(domain, op, opset)
        if defined is not None or own is None:
            return defined
        return Signature(1, _parameters(own["inputs"]), _parameters(own["outputs"]))


@cache
def kernel_table() -> KernelTable:
    """The packaged table."""
    text = (resources.files("phiconv") / "data" / TABLE_FILE).read_text(encoding="utf-8")
    document = json.loads(text)
    if document["format"] != FORMAT:
        raise ValueError(f"{TABLE_FILE} has format {document['format']}, not {FORMAT}")
    source = document["source"]
    return KernelTable(
        version=source["version"],
        commit=source["commit"],
        sha256=source["sha256"],
        _kernels=document["kernels"],
        _signatures=document["signatures"],
        _types=tuple(frozenset(listed.split()) for listed in document["types"]),
    )


def _parameters(listed: list[str]) -> tuple[Parameter, ...]:
    pairs = (item.split(":") for item in listed)
    return tuple(Parameter(name, kind, _only_type([kind])) for name, kind in pairs)


def _only_type(types: Collection[str]) -> str | None:
    """The element type of ONNX's type strings, if there is but one and it is a tensor's."""
    (kind,) = types if len(types) == 1 else ("",)
    match = re.fullmatch(r"tensor\((\w+)\)", kind)
    return match[1] if match else None


@cache
def _onnx_signature(domain: str, op: str, opset: int) -> Signature | None:
    import onnx

    try:
        # Any: the stubs of onnx leave out what tells a function
        schema: Any = onnx.defs.get_schema(op, opset, "" if domain == DEFAULT_DOMAIN else domain)
    except onnx.defs.SchemaError:
        return None

    allowed = {item.type_param_str: item.allowed_type_strs for item in schema.type_constraints}

    def parameters(formal: Any) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(
                item.name,
                item.type_str,
                _only_type(allowed.get(item.type_str, [item.type_str])),
                item.is_homogeneous,
            )
            for item in formal
        )

    return Signature(
        version=schema.since_version,
        inputs=parameters(schema.inputs),
        outputs=parameters(schema.outputs),
        function=domain == DEFAULT_DOMAIN
        and (schema.has_function or schema.has_context_dependent_function),
    )
