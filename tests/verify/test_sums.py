"""SHA256SUMS is read as it is written, and in no other way."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phiconv.verify.sums import differing_digits, is_portable, parse_sums, render_sums

DIGEST = hashlib.sha256(b"").hexdigest()
names = st.lists(
    st.text("abcXYZ019 _-.é", min_size=1, max_size=8), min_size=1, max_size=3
).map("/".join).filter(is_portable)  # fmt: skip


@given(st.dictionaries(names, st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=6))
def test_what_is_written_is_read(digests: dict[str, str]) -> None:
    assert parse_sums(render_sums(digests).encode()) == (digests, [])


@given(st.data())
def test_every_changed_byte_changes_what_is_read(data: st.DataObject) -> None:
    written = {"LICENSE": DIGEST, "a/b c.onnx": "0" * 64, "é": "f" * 64}
    text = bytearray(render_sums(written).encode())
    offset = data.draw(st.integers(0, len(text) - 1))
    text[offset] ^= data.draw(st.integers(1, 255))
    found, problems = parse_sums(bytes(text))
    assert problems or found != written


@pytest.mark.parametrize(
    "text",
    [
        f"{DIGEST} a\n",
        f"{DIGEST} *a\n",
        f"{DIGEST.upper()}  a\n",
        f"{DIGEST}  a",
        f"{DIGEST}  a\r\n",
        f"\\{DIGEST}  a\\\\b\n",
        f"{DIGEST}  ../a\n",
        f"{DIGEST}  b\n{DIGEST}  a\n",
        f"{DIGEST}  a\n{DIGEST}  a\n",
        f"{DIGEST}  a\n\n",
        "# a comment\n",
    ],
)
def test_other_ways_to_write_it(text: str) -> None:
    _, problems = parse_sums(text.encode())
    assert problems


def test_differing_digits() -> None:
    assert differing_digits("0123", "0123") == 0
    assert differing_digits("0123", "3120") == 2
