"""Single steps as an artifact ran them, against fp32 on the very same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.results import OperatorError, finite

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.diagnosis.reference_steps import ReferenceSteps
    from phiconv.diagnosis.weight_format import StoredWeight

INT8_TOLERANCE = 5e-2
"""Activations rounded to int8, each block of them with a scale of its own."""
# What rounding explains, by the coarsest type that a step reads or writes.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2}
_WEIGHT_ROWS = 8192

Values = Mapping[str, "NDArray[Any]"]


class StepCheck:
    """Compares steps of one layer and keeps the results.

    Args:
        values: The artifact's values by name, one window, each `[T, ...]`.
        layer: Index of the layer, or None.
        steps: The reference's steps for windows of that length.

    Attributes:
        errors: What was compared so far.
    """

    def __init__(self, values: Values, layer: int | None, steps: ReferenceSteps):
        self.errors: list[OperatorError] = []
        self._values = values
        self._layer = layer
        self._steps = steps

    def norm(self, component: str, source: str, output: str, weight: StoredWeight | None) -> None:
        """An RMS norm with the artifact's own weight; None where that could not be read."""
        if weight is not None:
            whole = weight.rows(0, weight.shape[0])
            self.step(component, [source], output, lambda x: self._steps.norm(x, whole))

    def linear(
        self,
        component: str,
        source: str,
        output: str,
        weight: StoredWeight | None,
        least_tolerance: float = 0.0,
    ) -> None:
        """A product with the artifact's own weight; None where that could not be read."""
        if weight is not None:
            self.step(
                component,
                [source],
                output,
                lambda x: _product(x, weight, self._steps),
                least_tolerance,
            )

    def rows(self, component: str, output: str, table: StoredWeight, ids: Sequence[int]) -> None:
        """An embedding's lookup in the artifact's own table."""
        self.step(component, [], output, lambda: _rows(table, ids))

    def step(
        self,
        component: str,
        inputs: Sequence[str],
        output: str,
        compute: Callable[..., NDArray[np.float32]],
        least_tolerance: float = 0.0,
    ) -> None:
        """Compares the value `output` with `compute(*inputs)`, all by their names.

        A step whose inputs are not there or not finite is left out: the step that made them is
        the one to name.
        """
        import numpy as np

        arrays = [self._values.get(name) for name in (*inputs, output)]
        if not all(array is not None for array in arrays):
            return
        *read, found = [array for array in arrays if array is not None]
        if not all(np.isfinite(array).all() for array in read):
            return
        expected = compute(*read)
        if found.size != expected.size:
            return  # a shape of its own: what reads it says so
        found = found.reshape(expected.shape)
        kinds = {array.dtype.name for array in (*read, *(a for a in arrays[-1:] if a is not None))}
        tolerance = max(least_tolerance, *(_TOLERANCES.get(kind, 1e-3) for kind in kinds))
        self.errors.append(_error(component, self._layer, found, expected, tolerance))


def _error(
    component: str,
    layer: int | None,
    found: NDArray[Any],
    expected: NDArray[np.float32],
    tolerance: float,
) -> OperatorError:
    import numpy as np

    usable = np.isfinite(found)
    largest = float(np.abs(found[usable].astype(np.float32)).max(initial=0.0))
    if not usable.all():
        count = f"{int((~usable).sum())} of {usable.size} values"
        peak = float(np.abs(expected).max(initial=0.0))
        detail = f"{count} are not finite; in fp32 they reach {peak:.4g}"
        if found.dtype == np.float16 and peak > (limit := float(np.finfo(np.float16).max)):
            detail = f"{count} overflow fp16: they reach {peak:.6g}, it ends at {limit:.6g}"
        return OperatorError(component, layer, None, tolerance, largest, detail)
    return OperatorError(component, layer, relative_error(found, expected), tolerance, largest)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float | None:
    """|found - expected| / |expected|, Euclidean; None when it is not finite."""
    import numpy as np

    # not numpy.linalg.norm: BLAS would start its threads for a few thousand numbers
    difference = float(np.square(np.subtract(found, expected, dtype=np.float64)).sum())
    length = float(np.square(expected, dtype=np.float64).sum())
    if difference == 0:
        return 0.0
    return finite((difference / length) ** 0.5) if length > 0 else None


def _product(
    values: NDArray[Any], weight: StoredWeight, steps: ReferenceSteps
) -> NDArray[np.float32]:
    import numpy as np

    rows = weight.shape[0]
    flat = values.reshape(len(values), -1)
    blocks = [
        steps.linear(flat, weight.rows(start, min(start + _WEIGHT_ROWS, rows)))
        for start in range(0, rows, _WEIGHT_ROWS)
    ]
    return np.concatenate(blocks, axis=1)


def _rows(table: StoredWeight, ids: Sequence[int]) -> NDArray[np.float32]:
    import numpy as np

    return np.concatenate([table.rows(token, token + 1) for token in ids])
