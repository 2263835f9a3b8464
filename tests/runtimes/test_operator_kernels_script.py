from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from docs import operator_kernels

DOCUMENT = """\
## Supported Operators and Data Types

- `N+` - registered for opset N and later

<a name="cpuexecutionprovider"/>

## Operators implemented by CPUExecutionProvider

| Op Name | Parameters | OpSet Version | Types Supported |
|---------|------------|---------------|-----------------|
|**Operator Domain:** *ai.onnx*||||
|Gather|*in* data:**T**<br> *in* indices:**Tind**<br> *out* output:**T**|13+|**T** = seq(tensor(int64)), tensor(string), tensor(float)<br/> **Tind** = tensor(int32), tensor(int64)|
|||[11, 12]|**T** = tensor(float)<br/> **Tind** = tensor(int64)|
|||10|**T** = sparse_tensor(float), map(int64,tensor(float))|
|LayerNormalization|*in* X:**T**<br> *in* Scale:**T**<br> *out* Y:**T**<br><br>or<br><br>*in* X:**T**<br> *in* Scale:**V**<br> *out* Y:**V**|17+|**T** = tensor(float)|
|||[1, 16]|**T** = tensor(float)<br/> **V** = tensor(float)|
| |
| |
|**Operator Domain:** *com.microsoft*||||
|FastGelu|*in* X:**T**<br> *in* bias:**T**<br> *in* ids:**tensor(int64)**<br> *out* outputs...:**T**|1+|**T** = tensor(float)|
| |
|**Operator Domain:** *com.microsoft.nchwc*||||
|Conv|*in* X:**T**<br> *out* Y:**T**|1+|**T** = tensor(float)|


## Operators implemented by DmlExecutionProvider

|**Operator Domain:** *ai.onnx*||||
|Gather|*in* data:**T**<br> *out* output:**T**|13+|**T** = tensor(float)|
"""  # noqa: E501 - as long as the document's lines


def test_kernels_signatures_and_source() -> None:
    table = json.loads(operator_kernels.render(DOCUMENT, "1.30.0", "abc"))
    types = [set(listed.split()) for listed in table["types"]]

    def kernels(provider: str, domain: str, op: str) -> list[tuple[int, int | None, dict]]:
        return [
            (row["since"], row["until"], {name: types[i] for name, i in row["types"].items()})
            for row in table["kernels"][provider][domain][op]
        ]

    indices = {"int32", "int64"}
    assert kernels("CPUExecutionProvider", "ai.onnx", "Gather") == [
        (13, None, {"T": {"string", "float"}, "Tind": indices}),
        (11, 12, {"T": {"float"}, "Tind": {"int64"}}),
        (10, 10, {"T": set()}),
    ]
    assert kernels("DmlExecutionProvider", "ai.onnx", "Gather") == [(13, None, {"T": {"float"}})]
    assert list(table["kernels"]["CPUExecutionProvider"]) == ["ai.onnx", "com.microsoft"]
    # what ONNX defines is not repeated; LayerNormalization before opset 17 is ONNX Runtime's own
    assert table["signatures"] == {
        "ai.onnx": {"LayerNormalization": {"inputs": ["X:T", "Scale:V"], "outputs": ["Y:V"]}},
        "com.microsoft": {
            "FastGelu": {
                "inputs": ["X:T", "bias:T", "ids:tensor(int64)"],
                "outputs": ["outputs:T"],
            }
        },
    }
    assert table["source"]["version"] == "1.30.0"
    assert table["source"]["commit"] == "abc"
    assert len(table["source"]["sha256"]) == 64


def test_the_packaged_table_is_small_and_as_the_script_writes_it() -> None:
    text = operator_kernels.TABLE.read_text(encoding="utf-8")
    table = json.loads(text)
    assert len(text) < 150_000
    assert table["format"] == operator_kernels.FORMAT
    assert table["types"] == sorted(table["types"], key=str.split)
    assert len(table["source"]["commit"]) == 40


def test_the_command_writes_the_same_bytes_whatever_the_line_ends(tmp_path: Path) -> None:
    written = []
    for name, text in (("unix", DOCUMENT), ("windows", DOCUMENT.replace("\n", "\r\n"))):
        (tmp_path / name).write_bytes(text.encode())
        out = tmp_path / f"{name}.json"
        options = ["--version", "1.30.0", "--commit", "abc", "--out", out]
        command = [sys.executable, operator_kernels.__file__, tmp_path / name, *options]
        subprocess.run(command, check=True)
        written.append(out.read_bytes())
    assert written[0] == written[1] == operator_kernels.render(DOCUMENT, "1.30.0", "abc").encode()


def test_a_document_in_another_form_is_an_error() -> None:
    changed = DOCUMENT.replace(
        "**T** = tensor(float)<br/> **V** = tensor(float)", "**W** = tensor(float)"
    )
    with pytest.raises(ValueError, match="no signature has the constraints W"):
        operator_kernels.render(changed, "1.30.0", "abc")
    with pytest.raises(ValueError, match="no kernels"):
        operator_kernels.render("# Another document\n", "1.30.0", "abc")
