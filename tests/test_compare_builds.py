"""`phiconv compare` on two real builds of the bundled checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.terminal import Terminal

ROOT = Path(__file__).parent.parent
SHORTER = (
    "--set", "check.window_length=128",
    "--set", "check.layer_errors=false",
)  # fmt: skip


def test_two_builds_compare_paired(phiconv: Terminal, tmp_path: Path) -> None:
    """Accuracy levels 1 and 4 of the same weights: far less apart than from the reference."""
    for recipe in ("int4-cpu-acc1", "int4-cpu"):
        options = ("--model", str(ROOT / "examples" / "tiny-phi3"), "--out", str(tmp_path / recipe))
        done = phiconv("build", str(ROOT / "recipes" / f"{recipe}.yaml"), *options, *SHORTER)
        assert done.code == 0, done.err
    both = [str(tmp_path / recipe) for recipe in ("int4-cpu-acc1", "int4-cpu")]
    (pair,) = json.loads(phiconv("compare", *both, "--json").out)["pairs"]
    assert pair["errors"]["kind"] == "paired"
    rows = {row["metric"]: row for row in pair["metrics"]}
    kl = []
    for side in both:
        document = json.loads((Path(side) / "report" / "report.json").read_text(encoding="utf-8"))
        metrics = document["result"]["validations"][0]["measurement"]["metrics"]
        with np.load(Path(side) / "report" / "positions.npz") as arrays:
            kl.append(arrays["check/kl_divergence"].mean(axis=1, dtype=np.float64))
        error = metrics["kl_divergence.standard_error"]
        assert error == pytest.approx(stats.sem(kl[-1]), rel=1e-4), "each window is one draw"
    row = rows["kl_divergence.mean"]
    statistic = stats.ttest_rel(kl[1], kl[0]).statistic
    assert row["difference"] / row["standard_error"] == pytest.approx(statistic, rel=1e-3)
    unpaired = np.hypot(*(stats.sem(means) for means in kl))
    assert row["standard_error"] < unpaired / 5
    shutil.rmtree(tmp_path / "int4-cpu" / "artifact")
    assert "paired by position, 8 windows" in phiconv("compare", *both).out, "reports are enough"
