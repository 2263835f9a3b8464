from __future__ import annotations

from pathlib import Path

from phiconv.parity.golden import conversations, golden_texts
from phiconv.parity.limitations import DECODE_LIMITATIONS, ENCODE_LIMITATIONS

DOCS = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")


def test_every_limitation_is_documented() -> None:
    for name in {*ENCODE_LIMITATIONS, *DECODE_LIMITATIONS}:
        assert f"| `{name}` |" in DOCS


def test_the_golden_set_is_documented() -> None:
    categories = {item.category for item in golden_texts()}
    for category in categories:
        assert f"`{category}`" in DOCS
    assert f"{len(golden_texts())} strings in {len(categories)} categories" in DOCS
    assert f"{len(conversations())} conversations" in DOCS
