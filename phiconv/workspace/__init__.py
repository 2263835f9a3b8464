"""The workspace: a content-addressed store of artifacts, shared by every recipe and process."""

from __future__ import annotations

from phiconv.workspace.entry import Entry, FileStamp
from phiconv.workspace.session import Session
from phiconv.workspace.store import Workspace

__all__ = ["Entry", "FileStamp", "Session", "Workspace"]
