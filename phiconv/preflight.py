"""Whether this machine can do a build, found out before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, PhiconvError, Problems
from phiconv.plan import Plan
from phiconv.workspace import Workspace
from phiconv.workspace.disk import free_bytes, same_device, size_text


def preflight(plans: Sequence[Plan], workspace: Workspace, out: Path) -> None:
    """Makes sure before any work that this machine can do it.

    Args:
        plans: What will be built.
        workspace: Where artifacts are made.
        out: Where they are published.

    Raises:
        EnvironmentLacksError: A provider, package, memory or disk space is missing (`Problems`
            for several); the numbers are in the message.
    """
    errors: list[PhiconvError] = []
    for plan in plans:
        for step in plan.to_build:
            for item in step.missing:
                if not item.optional:
                    message = f"stage {step.id!r} needs {item.name}, which is not present"
                    errors.append(
                        EnvironmentLacksError(message, where=step.place, remedy=item.remedy)
                    )
    errors += _memory_errors(plans) + _disk_errors(plans, workspace, out)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)


def _memory_errors(plans: Sequence[Plan]) -> list[PhiconvError]:
    needed = max((plan.ram_bytes for plan in plans), default=0)
    present = machine.memory_bytes()
    if needed <= present:
        return []
    message = f"about {size_text(needed)} of memory is needed, this machine has "
    return [EnvironmentLacksError(message + size_text(present))]


def _disk_errors(plans: Sequence[Plan], workspace: Workspace, out: Path) -> list[PhiconvError]:
    steps = {step.key: step for plan in plans for step in plan.to_build}
    needed = sum(step.estimate.disk_bytes for step in steps.values() if step.estimate)
    wanted = [(workspace.home, needed, "set PHICONV_HOME to a larger disk")]
    if not same_device(workspace.home, out):
        copied = [plan.step(plan.shipped).estimate for plan in plans]
        size = sum(estimate.disk_bytes for estimate in copied if estimate)
        wanted.append((out, size, "set --out to a larger disk"))
    errors: list[PhiconvError] = []
    for place, size, remedy in wanted:
        free = free_bytes(place)
        if size > free:
            message = f"about {size_text(size)} of disk is needed, {size_text(free)} is free"
            errors.append(
                EnvironmentLacksError(
                    message,
                    where=str(place),
                    remedy=f"free some space, `phiconv cache gc`, or {remedy}",
                )
            )
    return errors
