"""Gates outside a recipe: a YAML file, and `metric.bound=limit` on the command line."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from phiconv.errors import PhiconvError, Problems, RecipeError
from phiconv.gates import Limits, check_gates
from phiconv.recipe.document import Document, parse_value, read
from phiconv.recipe.keys import did_you_mean

Bound = Literal["min", "max"]
BOUNDS: tuple[Bound, ...] = ("min", "max")


@dataclass(frozen=True)
class GatesFile:
    """A file of gates.

    Attributes:
        limits: Metric name -> `min` and `max` -> limit; only metrics that have one.
        extra: Metric name -> key -> value of what else a reader may take.
    """

    limits: dict[str, dict[Bound, float]]
    extra: dict[str, dict[str, Any]]


def read_gates(file: Path, *, generates: bool, also: Collection[str] = ()) -> GatesFile:
    """Reads a file that maps metric names to `min` and `max`.

    Args:
        file: The YAML file.
        generates: Whether the runtime measures the generation metrics.
        also: Keys that may stand beside `min` and `max`.

    Raises:
        RecipeError: What is wrong, with `file:line`; `Problems` when there are several.
    """
    document = read(file, "gates")
    if document.data is not None and not isinstance(document.data, dict):
        raise RecipeError(
            "a file of gates maps metric names to min and max",
            where=document.name,
            remedy="such as kl_divergence.mean: {max: 0.05}",
        )
    errors: list[PhiconvError] = []
    found = GatesFile({}, {})
    for name, gate in (document.data or {}).items():
        errors += _add(found, document, name, gate, generates, also)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    return found


def _add(
    found: GatesFile,
    document: Document,
    name: str,
    gate: Any,
    generates: bool,
    also: Collection[str],
) -> list[PhiconvError]:
    """Takes one metric's gate into `found`; what is wrong with it."""
    if not isinstance(gate, dict):
        message = f"{name}: wants a mapping with min or max, not {gate!r}"
        return [RecipeError(message, where=document.place((name,)))]
    errors: list[PhiconvError] = []
    limits: dict[Bound, float] = {}
    extra: dict[str, Any] = {}
    for key, value in gate.items():
        where = document.place((name, key))
        if key in also:
            extra[key] = value
        elif key not in BOUNDS:
            remedy = did_you_mean(key, [*BOUNDS, *also])
            errors.append(RecipeError(f"{name}.{key}: unknown key", where=where, remedy=remedy))
        elif not _is_number(value):
            message = f"{name}.{key}: wants a finite number, not {value!r}"
            errors.append(RecipeError(message, where=where))
        else:
            limits[cast(Bound, key)] = float(value)
    if limits or not (extra or errors):
        for problem in check_gates({name: limits}, generates=generates):
            problem.where = document.place((name,))
            errors.append(problem)
        found.limits[name] = limits
    if extra:
        found.extra[name] = extra
    return errors


def with_settings(gates: Limits, settings: Collection[str]) -> dict[str, dict[Bound, float]]:
    """The gates with every `--set-gate metric.bound=limit` applied.

    Raises:
        RecipeError: A setting is not of that form (`Problems` for several). Whether there is such
            a metric is not looked at.
    """
    limits: dict[str, dict[Bound, float]] = {name: dict(gate) for name, gate in gates.items()}
    errors: list[PhiconvError] = []
    for text in settings:
        where = f"--set-gate {text}"
        target, equals, value_text = text.partition("=")
        name, dot, bound = target.strip().rpartition(".")
        if not (equals and dot and name and bound in BOUNDS):
            remedy = "such as --set-gate kl_divergence.mean.max=0.05"
            errors.append(RecipeError("wants metric.min=V or metric.max=V", where=where,
                                      remedy=remedy))  # fmt: skip
            continue
        value = parse_value(value_text, where)
        if _is_number(value):
            limits.setdefault(name, {})[bound] = float(value)
        else:
            errors.append(RecipeError(f"wants a finite number, not {value_text!r}", where=where))
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    return limits


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
