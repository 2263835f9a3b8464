"""What ends a command becomes a message on stderr and a documented exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import click

from phiconv.cli.signals import (
    INTERRUPTED_CODE,
    TERMINATED_CODE,
    TerminatedError,
    signals_handled,
)
from phiconv.errors import PhiconvError

USAGE_CODE = 2
UNEXPECTED_CODE = 3
ENVIRONMENT_CODE = 5
BROKEN_PIPE_CODE = 128 + 13
"""What a shell says of a process that SIGPIPE ended; Python ignores that signal."""
DEBUG_VARIABLE = "PHICONV_DEBUG"
_OF_THE_MACHINE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    getattr(errno, "EDQUOT", errno.ENOSPC),
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ENOMEM,
}
"""No permission, no space, too many open files, a broken disk, no memory: no defect of phiconv."""


@dataclass
class Settings:
    """What holds for the whole invocation."""

    verbose: bool = field(default_factory=lambda: bool(os.environ.get(DEBUG_VARIABLE)))


def spell_out_on_stdout() -> None:
    """Lets stdout spell out what its encoding lacks, as stderr does, instead of raising an error.

    On Windows a pipe or a file has the encoding of the country: a path, or a name in an artifact,
    may well hold other letters.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class ReaderLeftError(BaseException):
    """Nobody reads our output any more; not an `Exception`, so that only clean-up code sees it."""


@contextmanager
def reader_watched() -> Iterator[None]:
    """Raises `ReaderLeftError` where a pipe broke, before anything else makes something of that."""
    try:
        yield
    except BrokenPipeError as error:
        raise ReaderLeftError from error


@contextmanager
def boundary(settings: Settings) -> Iterator[None]:
    """Turns whatever ends a command into a message on stderr and an exit code."""
    with signals_handled():
        try:
            yield
        except PhiconvError as error:
            from phiconv.cli.annotations import annotate
            from phiconv.summary import error_text

            if settings.verbose:
                _print_traceback()
            click.echo(error_text(error), err=True)
            annotate(error)
            sys.exit(error.exit_code)
        except click.ClickException as error:
            error.show()
            sys.exit(USAGE_CODE)
        except click.Abort as stop:
            # What click makes of a KeyboardInterrupt, but also of an EOFError from anywhere.
            if isinstance(stop.__cause__, EOFError):
                _unexpected(stop.__cause__, settings)
                sys.exit(UNEXPECTED_CODE)
            _say_stopped("interrupted", stop.__cause__ or stop)
            sys.exit(INTERRUPTED_CODE)
        except KeyboardInterrupt as stop:
            _say_stopped("interrupted", stop)
            sys.exit(INTERRUPTED_CODE)
        except TerminatedError as stop:
            _say_stopped("terminated", stop)
            sys.exit(TERMINATED_CODE)
        except (BrokenPipeError, ReaderLeftError):
            # The reader of our output left; say nothing more, also not when Python flushes at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):  # no stream, or none of a file
                    os.dup2(nowhere, stream.fileno())
            sys.exit(BROKEN_PIPE_CODE)
        except OSError as error:
            if error.errno not in _OF_THE_MACHINE:
                _unexpected(error, settings)
                sys.exit(UNEXPECTED_CODE)
            _say_of_the_machine(error, settings)
            sys.exit(ENVIRONMENT_CODE)
        except Exception as error:
            _unexpected(error, settings)
            sys.exit(UNEXPECTED_CODE)


def _say_stopped(how: str, stop: BaseException) -> None:
    from phiconv.summary import notes

    kept = notes(stop) or ["nothing half-made was kept"]
    click.echo(f"{how}; {'; '.join(kept)}", err=True)


def _say_of_the_machine(error: OSError, settings: Settings) -> None:
    if settings.verbose:
        _print_traceback()
    where = "".join(f"\n  where: {name}" for name in (error.filename,) if name)
    click.echo(f"error: {error.strerror}{where}", err=True)


def _unexpected(error: Exception, settings: Settings) -> None:
    if settings.verbose:
        _print_traceback()
    click.echo(
        f"error: unexpected {type(error).__name__}: {error}\n"
        "  remedy: this is a defect of phiconv; please report it with the output of the same "
        "command with --verbose, and of `phiconv doctor`",
        err=True,
    )


def _print_traceback() -> None:
    import traceback

    click.echo(traceback.format_exc(), err=True)
