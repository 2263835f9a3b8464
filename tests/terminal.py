"""The command line in this process, as a user meets it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from phiconv.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Terminal:
    """Runs commands and catches what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Done:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        shown = self._capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Done(code, shown.out, shown.err)
