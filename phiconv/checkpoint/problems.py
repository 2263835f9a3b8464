"""Reports everything that is wrong with a checkpoint at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from phiconv.errors import CheckpointError

P = ParamSpec("P")
T = TypeVar("T")

NAMES_SHOWN = 5


class CheckpointProblemsError(CheckpointError):
    """Several problems of one checkpoint.

    Attributes:
        errors: The problems, each with its place and remedy.
    """

    def __init__(self, errors: Sequence[CheckpointError]):
        super().__init__("; ".join(error.message for error in errors))
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


def combined(errors: Sequence[CheckpointError]) -> CheckpointError:
    """One error that stands for all of `errors`, of which there must be at least one."""
    return errors[0] if len(errors) == 1 else CheckpointProblemsError(errors)


def attempt(
    errors: list[CheckpointError], function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T | None:
    """Calls `function`; when it raises a CheckpointError, adds what it stands for to `errors`."""
    try:
        return function(*args, **kwargs)
    except CheckpointProblemsError as error:
        errors.extend(error.errors)
    except CheckpointError as error:
        errors.append(error)
    return None


def name_list(names: Iterable[str]) -> str:
    """The first names, quoted, and how many more there are."""
    return listed([repr(name) for name in names], NAMES_SHOWN)


def listed(items: Sequence[str], most: int = 10) -> str:
    """The first items, and how many more there are."""
    shown = ", ".join(items[:most])
    hidden = len(items) - most
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def not_finite_error(names: Iterable[str], path: Path) -> CheckpointError:
    """The error for weights that hold NaN or Inf.

    Args:
        names: The tensors.
        path: The checkpoint's folder.
    """
    return CheckpointError(
        f"NaN or Inf in {listed(sorted(names))}",
        where=str(path),
        remedy="the checkpoint is damaged or diverged in training: get or make it again",
    )
