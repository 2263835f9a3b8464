"""Checks that a release, a build's output or a bare artifact is whole, offline.

Every file is covered by another: `SHA256SUMS` lists all but itself, the provenance statement lists
all but `SHA256SUMS` and itself, and both are read strictly. So a damaged byte shows wherever it is,
and the two lists together tell a damaged file from a damaged list.
"""

from __future__ import annotations

from phiconv.verify.folder import verify
from phiconv.verify.results import Problem, Verification

__all__ = ["Problem", "Verification", "verify"]
