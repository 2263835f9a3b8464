"""Figures in words."""

from __future__ import annotations

from phiconv.units import amount_text, seconds_text, size_text


def test_sizes() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 999_949, 999_950, 2_500_000_000)] == [
        "0 B",
        "999 B",
        "1.0 KB",
        "999.9 KB",
        "1.0 MB",
        "2.5 GB",
    ]
    assert size_text(3 * 10**15) == "3000.0 TB"


def test_seconds() -> None:
    assert [seconds_text(s) for s in (0.04, 59.94, 59.96, 245, 7380)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "4 min 05 s",
        "2 h 03 min",
    ]


def test_amounts() -> None:
    assert amount_text(5, None, "bytes") == "5 B"
    assert amount_text(1_100_000, 2_400_000, "bytes") == "1.1 MB of 2.4 MB"
    assert amount_text(512, 4096, "tokens") == "512 of 4096 tokens"
    assert amount_text(512, None, "tokens") == "512 tokens"
    assert amount_text(40_000, 4_194_304, "tokens") == "0.0 M of 4.2 M tokens"
    assert amount_text(999_999, 999_999, "tokens") == "999999 of 999999 tokens"
    assert amount_text(1_500_000, None, "tokens") == "1.5 M tokens"
