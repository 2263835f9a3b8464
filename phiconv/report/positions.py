"""positions.npz: what each measurement of a report found at every position.

It lies beside report.json and goes wherever the folder goes, so that `phiconv compare` can pair two
reports position by position. For each validate stage that was measured it holds `STAGE/ids_digest`
(text) and, as arrays [windows, window_length], `STAGE/kl_divergence` (float32, nats),
`STAGE/top1_equal` (bool), `STAGE/reference_log_probability` and `STAGE/candidate_log_probability`
(float32, nats; NaN at the last position of a window). 4,096 positions take about 50 KB.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phiconv.metrics.positions import PositionValues
    from phiconv.report.results import Validation

POSITIONS = "positions.npz"

_FLOATS = ("kl_divergence", "reference_log_probability", "candidate_log_probability")
_TOP1, _DIGEST = "top1_equal", "ids_digest"


class PositionsError(Exception):
    """Why a report's positions cannot be used, in words; never the end of a comparison."""


def write_positions(
    file: Path, validations: Sequence[Validation], measurements: Mapping[str, Path]
) -> None:
    """Writes positions.npz, or nothing when nothing was measured.

    Args:
        file: Where to.
        validations: What the report is about.
        measurements: Stage -> the folder of its measurement; the stage `validate` leaves its
            arrays there, another one need not.

    Raises:
        OSError: A file cannot be read or written.
    """
    import numpy as np

    arrays: dict[str, Any] = {}
    for validation in validations:
        folder = measurements.get(validation.stage)
        if folder is None or not (folder / POSITIONS).is_file():
            continue
        with np.load(folder / POSITIONS, allow_pickle=False) as found:
            for name in _FLOATS:
                arrays[f"{validation.stage}/{name}"] = found[name].astype(np.float32)
            arrays[f"{validation.stage}/{_TOP1}"] = found[_TOP1]
        digest = validation.measurement.tokens.ids_digest
        arrays[f"{validation.stage}/{_DIGEST}"] = np.array(digest)
    if arrays:
        with file.open("wb") as out:
            np.savez_compressed(out, **arrays)


def read_positions(file: Path, validation: Validation) -> PositionValues:
    """The values of one validation of the report beside `file`.

    Raises:
        PositionsError: There are none, or they are not those of this measurement.
    """
    import numpy as np

    from phiconv.metrics.positions import PositionValues

    if not file.is_file():
        raise PositionsError(f"there is no {file}")
    names = (*_FLOATS, _TOP1, _DIGEST)
    try:
        # opened here: numpy leaves a file that it cannot read open
        with file.open("rb") as data, np.load(data, allow_pickle=False) as arrays:
            found = {name: arrays[f"{validation.stage}/{name}"] for name in names}
    except KeyError as error:
        raise PositionsError(f"{file} has nothing of {validation.stage!r}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PositionsError(f"{file} cannot be read: {error}") from error
    if not _belongs(found, validation):
        raise PositionsError(f"{file} is of another measurement than the report beside it")
    values = {name: found[name].astype(np.float64) for name in _FLOATS}
    return PositionValues(top1_equal=found[_TOP1], **values)


def _belongs(found: Mapping[str, Any], validation: Validation) -> bool:
    """Whether tokens, shapes and means are those of the report."""
    import numpy as np

    measurement = validation.measurement
    tokens = measurement.tokens
    shape = (tokens.windows, tokens.window_length)
    if str(found[_DIGEST]) != tokens.ids_digest or found[_TOP1].dtype != np.bool_:
        return False
    if any(found[name].shape != shape for name in (*_FLOATS, _TOP1)):
        return False
    with np.errstate(all="ignore"):
        means = {
            "kl_divergence.mean": float(found["kl_divergence"].mean(dtype=np.float64)),
            "top1_agreement": float(found[_TOP1].mean()),
        }
    return all(_same(mean, measurement.metrics.get(name)) for name, mean in means.items())


def _same(mean: float, reported: float | None) -> bool:
    """Equal but for the rounding of float32; a report says None for what is not finite."""
    if reported is None:
        return not math.isfinite(mean)
    return math.isclose(mean, reported, rel_tol=1e-5, abs_tol=1e-12)
