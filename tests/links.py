"""Symbolic links, which Windows lets only the privileged make."""

from __future__ import annotations

from pathlib import Path

import pytest


def link_or_skip(link: Path, target: Path | str, *, to_folder: bool = False) -> None:
    """Makes a symbolic link; the test is skipped where that cannot be done."""
    try:
        link.symlink_to(target, target_is_directory=to_folder)
    except OSError:
        pytest.skip("links need a privilege here")
    if not link.is_symlink():
        pytest.skip("there are no links here")
