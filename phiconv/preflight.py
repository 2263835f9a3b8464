"""Whether this machine can do a build, found out before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, PhiconvError, Problems
from phiconv.plan import Plan
from phiconv.units import size_text
from phiconv.workspace import Workspace
from phiconv.workspace.disk import free_bytes, same_device


def preflight(builds: Sequence[tuple[Plan, Path]], workspace: Workspace) -> None:
    """Makes sure before any work that this machine can do it.

    Args:
        builds: Plans and their output folders.
        workspace: Where artifacts are made.

    Raises:
        EnvironmentLacksError: A provider, package, memory or disk space is missing (`Problems`
            for several); the numbers are in the message.
    """
    plans = [plan for plan, _ in builds]
    errors = [
        *(error for plan in plans for error in lacking(plan)),
        *_memory_errors(plans),
        *_disk_errors(builds, workspace),
    ]
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)


def lacking(plan: Plan) -> list[PhiconvError]:
    """What the steps to build require and this machine has not, and cannot do without."""
    return [
        EnvironmentLacksError(
            f"stage {step.id!r} needs {item.name}, which is not present",
            where=step.place,
            remedy=item.remedy,
        )
        for step in plan.to_build
        for item in step.missing
        if not item.optional
    ]


def _memory_errors(plans: Sequence[Plan]) -> list[PhiconvError]:
    needed = max((plan.ram_bytes for plan in plans), default=0)
    present = machine.memory_bytes()
    if needed <= present:
        return []
    message = f"about {size_text(needed)} of memory is needed, this machine has "
    remedy = "use a machine with more memory, or raise the limit that this process was given"
    return [EnvironmentLacksError(message + size_text(present), remedy=remedy)]


def _disk_errors(builds: Sequence[tuple[Plan, Path]], workspace: Workspace) -> list[PhiconvError]:
    steps = {step.key: step for plan, _ in builds for step in plan.to_build}
    needed = sum(step.estimate.disk_bytes for step in steps.values() if step.estimate)
    elsewhere: list[tuple[Path, int, str]] = []
    for plan, out in builds:
        shipped = plan.step(plan.shipped).estimate if plan.given is None else None
        if shipped is None:
            continue
        # On one disk the artifact is moved to the output, or shares its blocks.
        if not same_device(workspace.home, out):
            elsewhere.append((out, shipped.disk_bytes, "choose a larger disk with --out"))
    wanted = [(workspace.home, needed, "set PHICONV_HOME to a larger disk"), *elsewhere]
    return [
        EnvironmentLacksError(
            f"about {size_text(size)} of disk is needed, {size_text(free)} is free",
            where=str(place),
            remedy=f"free some space, `phiconv cache gc`, or {remedy}",
        )
        for place, size, remedy in wanted
        if size > (free := free_bytes(place))
    ]
