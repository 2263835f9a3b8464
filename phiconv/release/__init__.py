"""Puts the outputs of several builds into one folder that can be published as it is."""

from __future__ import annotations

from phiconv.release.assembly import Released, assemble
from phiconv.release.plan import ReleaseOptions, ReleasePlan, plan_release

__all__ = ["ReleaseOptions", "ReleasePlan", "Released", "assemble", "plan_release"]
