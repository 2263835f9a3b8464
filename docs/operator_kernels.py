"""Distils ONNX Runtime's docs/OperatorKernels.md into phiconv/data/operator_kernels.json.

    python docs/operator_kernels.py OperatorKernels.md --version 1.30.0 --commit <sha>

The document lists, for each execution provider, the operators it has kernels for, their opset
ranges and the types of each type constraint. The table keeps all of that for the operator domains
a model may use, one operator a line, each distinct list of types once.
`phiconv.runtimes.kernel_table` reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

TABLE = Path(__file__).parents[1] / "phiconv" / "data" / "operator_kernels.json"
FORMAT = 1
# The document's other domains hold what ONNX Runtime's own graph optimizations make.
DOMAINS = ("ai.onnx", "ai.onnx.ml", "com.microsoft")

_PROVIDER = re.compile(r"## Operators implemented by (\w+)")
_DOMAIN = re.compile(r"\|\*\*Operator Domain:\*\* \*([\w.]+)\*")
_ROW = re.compile(r"\|(?P<op>\w*)\|(?P<parameters>[^|]*)\|(?P<range>[\d, +[\]]+)\|(?P<types>.*)\|$")
_RANGE = re.compile(r"(?P<start>\d+)(?P<open>\+)?|\[(?P<first>\d+), (?P<last>\d+)\]")
_CONSTRAINT = re.compile(r"\*\*(\w+)\*\* = ([^*<]+)")
_PARAMETER = re.compile(r"\*(in|out)\* (\w+)(?:\.\.\.)?:\*\*([\w()]+)\*\*")
_TENSOR = re.compile(r"tensor\((\w+)\)")

Kernel = dict[str, Any]
"""`since`, `until` (None: open) and `types`: constraint to a sorted tuple of type names."""
Kernels = dict[str, dict[str, dict[str, list[Kernel]]]]
"""By provider, domain and operator."""
Signature = dict[str, list[str]]
"""`inputs` and `outputs`, each parameter as `name:constraint`."""


def parse(document: str) -> tuple[Kernels, dict[str, dict[str, list[Signature]]]]:
    """Kernels, and by domain and operator the parameter lists of all its versions."""
    kernels: Kernels = {}
    signatures: dict[str, dict[str, list[Signature]]] = {}
    provider = domain = op = ""
    for line in document.splitlines():
        if match := _PROVIDER.match(line):
            provider = match[1]
        elif match := _DOMAIN.match(line):
            domain, op = match[1], ""
        elif (row := _ROW.match(line)) and domain in DOMAINS:
            op = row["op"] or op
            operators = kernels.setdefault(provider, {}).setdefault(domain, {})
            operators.setdefault(op, []).append(_kernel(row["range"], row["types"]))
            if row["op"]:
                signatures.setdefault(domain, {})[op] = _signatures(row["parameters"])
    return kernels, signatures


def _kernel(versions: str, types: str) -> Kernel:
    match = _RANGE.fullmatch(versions)
    if match is None:
        raise ValueError(f"not an opset range: {versions}")
    since = int(match["start"] or match["first"])
    until = None if match["open"] else int(match["last"] or since)
    constraints = {}
    for name, listed in _CONSTRAINT.findall(types):
        # sequences, maps, sparse and optional tensors are left out
        found = (_TENSOR.fullmatch(item) for item in listed.strip().split(", "))
        constraints[name] = tuple(sorted(item[1] for item in found if item))
    return {"since": since, "until": until, "types": constraints}


def _signatures(text: str) -> list[Signature]:
    parts = [_PARAMETER.findall(version) for version in text.split("<br><br>or<br><br>")]
    return [
        {
            "inputs": [f"{name}:{kind}" for way, name, kind in found if way == "in"],
            "outputs": [f"{name}:{kind}" for way, name, kind in found if way == "out"],
        }
        for found in parts
    ]


def runtime_signatures(
    kernels: Kernels, signatures: dict[str, dict[str, list[Signature]]]
) -> dict[str, dict[str, Signature]]:
    """Signatures of the operators that ONNX does not define: those ONNX Runtime added itself.

    These are com.microsoft's and some in ai.onnx: operators with a kernel for opset 1 onwards, a
    range in which ONNX has no such operator.
    """
    versions: dict[tuple[str, str], set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        key = (schema.domain or "ai.onnx", schema.name)
        versions.setdefault(key, set()).add(schema.since_version)
    found: dict[str, dict[str, Signature]] = {}
    for domains in kernels.values():
        for domain, operators in domains.items():
            for op, rows in operators.items():
                row = next((row for row in rows if row["since"] == 1), None)
                if row is None:
                    continue
                if versions.get((domain, op), set()).isdisjoint(range(1, (row["until"] or 1) + 1)):
                    own = found.setdefault(domain, {})
                    own[op] = _fitting(signatures[domain][op], row["types"])
    return found


def _fitting(signatures: Iterable[Signature], constraints: Iterable[str]) -> Signature:
    """The signature that has all of a kernel's constraints (which may name a parameter)."""
    for signature in signatures:
        words = ":".join(signature["inputs"] + signature["outputs"]).split(":")
        if set(constraints) <= set(words):
            return signature
    raise ValueError(f"no signature has the constraints {', '.join(constraints)}")


def render(document: str, version: str, commit: str) -> str:
    """The table as JSON with one operator a line.

    Args:
        document: Text of OperatorKernels.md.
        version: ONNX Runtime's VERSION_NUMBER beside it.
        commit: Commit of microsoft/onnxruntime it was taken from.

    Raises:
        ValueError: The document is not of the form this script knows.
    """
    kernels, signatures = parse(document)
    if not kernels:
        raise ValueError("no kernels in this document")
    own = runtime_signatures(kernels, signatures)
    lists = sorted(
        {
            types
            for domains in kernels.values()
            for operators in domains.values()
            for rows in operators.values()
            for row in rows
            for types in row["types"].values()
        }
    )
    number = {types: index for index, types in enumerate(lists)}
    for domains in kernels.values():
        for operators in domains.values():
            for rows in operators.values():
                for row in rows:
                    row["types"] = {name: number[types] for name, types in row["types"].items()}
    source = {
        "document": "https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md",
        "version": version,
        "commit": commit,
        "sha256": hashlib.sha256(document.encode()).hexdigest(),
    }
    parts = [
        f'"format": {FORMAT}',
        f'"source": {_lines(source, 1)}',
        f'"types": {_lines([" ".join(types) for types in lists], 1)}',
        f'"signatures": {_lines(own, 2)}',
        f'"kernels": {_lines(kernels, 3)}',
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _lines(value: Any, depth: int) -> str:
    """JSON whose outermost `depth` levels have one item a line."""
    if depth == 0:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_lines(value[key], depth - 1)}" for key in sorted(value)]
        return "{\n" + ",\n".join(items) + "\n}"
    return "[\n" + ",\n".join(_lines(item, depth - 1) for item in value) + "\n]"


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("document", type=Path, help="an OperatorKernels.md")
    parser.add_argument("--version", required=True, help="ONNX Runtime's VERSION_NUMBER beside it")
    parser.add_argument("--commit", required=True, help="commit of microsoft/onnxruntime")
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    text = arguments.document.read_bytes().decode("utf-8").replace("\r\n", "\n")
    table = render(text, arguments.version, arguments.commit)
    arguments.out.write_text(table, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
