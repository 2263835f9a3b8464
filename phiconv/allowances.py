"""How much worse than a baseline a metric may be, as `phiconv compare` is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import PhiconvError, Problems, RecipeError
from phiconv.gates import BUILT_IN, unknown_metric
from phiconv.metrics import METRICS

if TYPE_CHECKING:
    from phiconv.gates import Bound

MAX_REGRESSION = "max_regression"
"""The key of a gates file beside `min` and `max`: how much worse than the baseline."""


@dataclass(frozen=True)
class Allowance:
    """By how much a metric may get worse.

    Attributes:
        absolute: In the metric's own unit.
        relative: As a share of the baseline's value.
        by_default: Whether it holds because nobody set another.
    """

    absolute: float = 0.0
    relative: float = 0.0
    by_default: bool = False

    def of(self, baseline: float) -> float:
        """The greater of both, in the metric's own unit."""
        return max(self.absolute, self.relative * abs(baseline))


DEFAULT: Mapping[str, Allowance] = {
    # a tenth, but of a divergence that is no more than rounding a little in any case
    "kl_divergence.mean": Allowance(absolute=1e-4, relative=0.1, by_default=True),
    "top1_agreement": Allowance(absolute=0.01, by_default=True),
    "perplexity.ratio": Allowance(absolute=0.01, by_default=True),
    **{name: Allowance(by_default=True) for name in BUILT_IN},
}
"""What `phiconv compare` allows when it is not told otherwise."""


def regression_gates(
    file: Path | None, settings: Sequence[str]
) -> tuple[dict[str, Allowance], dict[str, dict[Bound, float]]]:
    """The allowances and limits of a gates file, or the defaults, with settings on top.

    Args:
        file: Maps metric names to `max_regression`, `min` and `max`.
        settings: Texts `metric=allowance`.

    Raises:
        RecipeError: What is wrong (`Problems` for several).
    """
    from phiconv.recipe.gates_file import read_gates

    allowances, limits = dict(DEFAULT), {}
    if file is not None:
        found = read_gates(file, generates=True, also=(MAX_REGRESSION,))
        limits = found.limits
        texts = {
            name: (str(extra[MAX_REGRESSION]), f"{file}: {name}.{MAX_REGRESSION}")
            for name, extra in found.extra.items()
        }
        allowances = with_allowances({}, texts)
    texts = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        texts[name.strip()] = text, f"--max-regression {setting}"
    return with_allowances(allowances, texts), limits


def parse_allowance(text: str, where: str) -> Allowance:
    """An allowance as it is written: `0.002`, or `10%` of the baseline.

    Raises:
        RecipeError: It is neither, or is negative.
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise RecipeError(
            f"wants a number of at least 0, or a percentage of the baseline, not {text!r}",
            where=where,
            remedy="such as 0.002 or 10%",
        )
    return Allowance(relative=value / 100) if number.endswith("%") else Allowance(absolute=value)


def with_allowances(
    base: Mapping[str, Allowance], texts: Mapping[str, tuple[str, str]]
) -> dict[str, Allowance]:
    """The allowances with others set.

    Args:
        base: Those that hold so far.
        texts: Metric name -> what is written, and where it stands.

    Raises:
        RecipeError: A metric is unknown or has no better way, or what is written is no allowance
            (`Problems` for several).
    """
    allowances = dict(base)
    errors: list[PhiconvError] = []
    for name, (text, where) in texts.items():
        if name not in METRICS:
            message, remedy = unknown_metric(name)
            errors.append(RecipeError(message, where=where, remedy=remedy))
        elif METRICS[name].better == "neither":
            errors.append(RecipeError(f"{name} can get neither better nor worse", where=where))
        else:
            try:
                allowances[name] = parse_allowance(text, where)
            except RecipeError as error:
                errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    return allowances
