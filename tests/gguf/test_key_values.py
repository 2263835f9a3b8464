"""Packed lists have the bytes that gguf's own writer gives them."""

from __future__ import annotations

import io
from typing import Any

import gguf
import pytest

from phiconv.gguf.key_values import KeyValueWriter


def key_values(writer: gguf.GGUFWriter, value: Any) -> bytes:
    writer.add_array("tokenizer.list", value)
    writer.add_uint32("after", 7)
    file = io.BytesIO()
    writer.fout = [file]  # type: ignore[list-item]
    writer.state = gguf.gguf_writer.WriterState.HEADER
    writer.write_kv_data_to_file()
    return file.getvalue()


@pytest.mark.parametrize(
    "value",
    [
        ["a", "", "é▁😀"],
        ("only one",),
        [0, -1, 2**31 - 1],
        (1.5, -0.0, -1e30),
        [True, False],
        [b"bytes", b""],
        ["text", b"bytes"],
        b"bytes",
        [["a"], ["b", "c"]],
    ],
    ids=str,
)
def test_lists_are_packed_as_gguf_packs_them(value: Any) -> None:
    ours, theirs = KeyValueWriter(None, "phi3"), gguf.GGUFWriter(None, "phi3")
    assert key_values(ours, value) == key_values(theirs, value)


@pytest.mark.parametrize("value", [[1, "text"], [1, 1.5], [2**31], [None]], ids=str)
def test_what_gguf_refuses_is_refused(value: Any) -> None:
    with pytest.raises(Exception) as expected:  # whatever it raises
        key_values(gguf.GGUFWriter(None, "phi3"), value)
    with pytest.raises(type(expected.value)):
        key_values(KeyValueWriter(None, "phi3"), value)
