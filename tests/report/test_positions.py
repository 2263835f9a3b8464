"""positions.npz: written with a report, read back only for the measurement it belongs to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phiconv.report import write_reports
from phiconv.report.positions import POSITIONS, PositionsError, read_positions
from phiconv.report.results import Measurement, Validation
from tests.report.results import measured, not_run, positions, result, validation, with_positions


def save(folder: Path, *stages: str, seed: int = 0) -> tuple[Path, tuple[Validation, ...]]:
    """A report of validate stages with their positions; the file, and the validations."""
    found = [with_positions(folder / f"measurement-{stage}", seed) for stage in stages]
    validations = tuple(validation(stage, item) for stage, item in zip(stages, found, strict=True))
    folders = {stage: folder / f"measurement-{stage}" for stage in stages}
    write_reports(result(*validations), folder / "report", folders)
    return folder / "report" / POSITIONS, validations


def test_every_stage_gets_its_own_values_back(tmp_path: Path) -> None:
    file, validations = save(tmp_path, "cpu", "genai")
    expected = positions(0)
    for item in validations:
        found = read_positions(file, item)
        np.testing.assert_array_equal(found.top1_equal, expected["top1_equal"])
        for name in ("kl_divergence", "reference_log_probability", "candidate_log_probability"):
            array = getattr(found, name)
            assert array.dtype == np.float64
            np.testing.assert_allclose(array, expected[name], rtol=1e-6)
    assert file.stat().st_size < 2 * 55_000, "small beside a report"


def test_without_measured_positions_there_is_no_file(tmp_path: Path) -> None:
    write_reports(result(validation("check", not_run())), tmp_path, {"check": tmp_path})
    assert not (tmp_path / POSITIONS).exists()
    with pytest.raises(PositionsError, match=r"there is no .*positions\.npz"):
        read_positions(tmp_path / POSITIONS, validation("check", measured()))


def other_tokens(found: Measurement) -> Measurement:
    return replace(found, tokens=replace(found.tokens, ids_digest="sha256:" + "9" * 64))


def other_windows(found: Measurement) -> Measurement:
    return replace(found, tokens=replace(found.tokens, windows=4, window_length=1024))


def other_values(found: Measurement) -> Measurement:
    return replace(found, metrics={**found.metrics, "kl_divergence.mean": 0.5})


@pytest.mark.parametrize("change", [other_tokens, other_windows, other_values])
def test_positions_of_another_measurement_are_not_taken(tmp_path: Path, change: object) -> None:
    file, (found,) = save(tmp_path, "check")
    assert callable(change)
    with pytest.raises(PositionsError, match="of another measurement"):
        read_positions(file, replace(found, measurement=change(found.measurement)))


def test_another_stage_has_none(tmp_path: Path) -> None:
    file, (found,) = save(tmp_path, "check")
    with pytest.raises(PositionsError, match="has nothing of 'genai'"):
        read_positions(file, replace(found, stage="genai"))


@pytest.mark.parametrize("keep", [0, 3, 2000, -10])
def test_a_damaged_file_is_said_to_be(tmp_path: Path, keep: int) -> None:
    file, (found,) = save(tmp_path, "check")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PositionsError, match="cannot be read"):
        read_positions(file, found)


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    file, (found,) = save(tmp_path, "check")
    with np.load(file) as arrays:
        kept = dict(arrays)
    kept["check/top1_equal"] = np.array([object()])
    np.savez(file, **kept)
    with pytest.raises(PositionsError, match="cannot be read"):
        read_positions(file, found)


def test_values_that_are_not_finite_belong_to_a_metric_that_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "measurement-check"
    found = with_positions(folder, 0)
    arrays = positions(0)
    arrays["kl_divergence"][0, 0] = np.nan
    np.savez(folder / POSITIONS, **arrays)
    broken = replace(found, metrics={**found.metrics, "kl_divergence.mean": None})
    item = validation("check", broken)
    write_reports(result(item), tmp_path / "report", {"check": folder})
    assert np.isnan(read_positions(tmp_path / "report" / POSITIONS, item).kl_divergence[0, 0])
