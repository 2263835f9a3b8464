"""Every error phiconv raises on purpose: what happened, where, and what to do about it.

The library raises; only the command line prints and exits. Each class carries the documented
process exit code (docs/exit-codes.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted_when_stopped(note: str) -> Iterator[None]:
    """Adds a note to what interrupts the work inside: a signal, but no error.

    Args:
        note: What was kept, for whoever stopped it.
    """
    try:
        yield
    except BaseException as stop:
        if not isinstance(stop, Exception):
            stop.add_note(note)
        raise


class PhiconvError(Exception):
    """An error with a place and a remedy.

    Args:
        message: What is wrong, in one sentence.
        where: The recipe file and key, stage, checkpoint file or tensor it concerns.
        remedy: What the user can do about it.
    """

    exit_code = 3

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None):
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.message]
        if self.where:
            parts.append(f"where: {self.where}")
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        return "\n".join(parts)


class RecipeError(PhiconvError):
    """The recipe or the command line is wrong; nothing was started."""

    exit_code = 2


class StageError(PhiconvError):
    """A stage could not produce its artifact."""

    exit_code = 3


class CheckpointError(StageError):
    """The source checkpoint is broken, incomplete or unsupported."""


class ExportError(StageError):
    """The ONNX graph could not be built or rewritten."""


class GateError(PhiconvError):
    """A measured accuracy did not meet its gate."""

    exit_code = 4


class EnvironmentLacksError(PhiconvError):
    """This machine lacks a provider, package, disk space, memory or model."""

    exit_code = 5


class Problems(RecipeError):  # noqa: N818 - the plural says it
    """Several errors found before any work started, reported together.

    The exit code is that of the first error.
    """

    def __init__(self, errors: list[PhiconvError]):
        super().__init__("; ".join(error.message for error in errors))
        self.errors = errors
        self.exit_code = errors[0].exit_code

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)
