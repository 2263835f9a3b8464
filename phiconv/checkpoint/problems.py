"""Reports everything that is wrong with a checkpoint at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    quoted = [repr(name) for name in names]
    shown = ", ".join(quoted[:NAMES_SHOWN])
    hidden = len(quoted) - NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown
