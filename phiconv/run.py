"""Executes a plan: takes each step from the workspace or runs it, judges, reports, publishes."""

from __future__ import annotations

import errno
import threading
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv import machine
from phiconv.assessment import TENSOR_KINDS, Made, Shipped, assess, manifest, measurement_folders
from phiconv.errors import EnvironmentLacksError, PhiconvError, StageError
from phiconv.inspect import tensor_kinds
from phiconv.plan import Plan, Step
from phiconv.progress import Display
from phiconv.publish import ARTIFACT as ARTIFACT_FOLDER
from phiconv.publish import REPORT, publish
from phiconv.recipe.model import Recipe
from phiconv.report.results import RunResult, StageRecord
from phiconv.resources import Meter, Usage, without_collections
from phiconv.stages.stage import (
    JSON,
    ONNX,
    Artifact,
    InputRef,
    Preloading,
    Stage,
    StageContext,
)
from phiconv.units import size_text
from phiconv.workspace import Entry, Session, Workspace
from phiconv.workspace.disk import disk_full
from phiconv.workspace.entry import ARTIFACT
from phiconv.workspace.lending import take_back
from phiconv.workspace.store import remove_tree

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint


@dataclass(frozen=True)
class Built:
    """A finished build.

    Attributes:
        plan: What was planned.
        result: What was found out.
        artifact: Where the artifact is.
        report: Where the reports are.
    """

    plan: Plan
    result: RunResult
    artifact: Path
    report: Path


def open_checkpoint(
    recipe: Recipe,
    workspace: Workspace,
    display: Display,
    *,
    download: bool,
    preload: bool,
) -> Checkpoint:
    """Opens a recipe's source and hashes what was not hashed before.

    Args:
        recipe: The recipe.
        workspace: Keeps the digests.
        display: Where progress is shown.
        download: Whether a model of the Hub may be downloaded.
        preload: Import what a build needs while an unknown checkpoint is hashed.

    Raises:
        CheckpointError: The checkpoint is broken, incomplete or unsupported.
        EnvironmentLacksError: The model is not there, or cannot be downloaded.
    """
    from phiconv.checkpoint import DigestCache, resolve

    with Meter() as meter:
        progress = display.step("checkpoint", recipe.source, lambda: meter.peak_rss_bytes)
        checkpoint = resolve(
            recipe.source,
            recipe.revision,
            DigestCache(workspace.digests),
            download=download,
            on_bytes=lambda count: progress.advance(count, "downloading"),
        )
        progress.start(checkpoint.file_nbytes)
        if preload and not checkpoint.is_hashed():
            # Nothing of an unknown checkpoint is cached: every stage will run.
            threading.Thread(target=_preload, args=[recipe], name="phiconv-preload").start()
        checkpoint.hash_files(on_bytes=lambda count: progress.advance(count, "hashing"))
    return checkpoint


def _preload(recipe: Recipe) -> None:
    """Imports what the stages need, and makes what the report needs; in a thread of its own.

    Whatever fails here fails again where it is needed, and is said there. An interrupt makes
    imports fail in any way.
    """
    with suppress(Exception):
        for use in recipe.stages:
            _preload_stage(use.stage)
        from phiconv.report.html import load_templates

        load_templates()


def _preload_stage(stage: Stage) -> None:
    """Imports what a stage needs; what is missing is said by the stage itself."""
    if isinstance(stage, Preloading):
        with suppress(PhiconvError, ImportError), without_collections():
            stage.preload()


def build(
    plan: Plan,
    session: Session,
    out: Path,
    *,
    threads: int,
    display: Display,
    needed: Collection[str] = (),
) -> Built:
    """Builds what a plan says and publishes it.

    Args:
        plan: The plan.
        session: The workspace.
        out: The output folder.
        threads: How many threads a stage may use.
        display: Where progress is shown.
        needed: Keys of artifacts that this session will read afterwards.

    Raises:
        PhiconvError: A stage failed; the output folder stays as it was.
    """
    display.begin(f"building {plan.recipe.name}", len(plan.at_hand))
    runner = Runner(plan, session, threads, display)
    for step in plan.at_hand:
        runner.ensure(step)
    entry = runner.made[plan.shipped].entry
    result = assess(plan, runner.made, Shipped.of(entry))
    measurements = measurement_folders(plan, runner.made)

    def write_report(folder: Path) -> None:
        from phiconv.report import write_reports

        write_reports(result, folder, measurements)

    try:
        lendable = entry.key not in needed
        publish(out, entry, write_report, manifest(plan, result), session, lendable=lendable)
    except OSError as error:
        raise disk_full(error, out, entry.size_bytes) or _unwritable(error, out) from error
    return Built(plan, result, out / ARTIFACT_FOLDER, out / REPORT)


def _unwritable(error: OSError, out: Path) -> EnvironmentLacksError:
    return EnvironmentLacksError(
        f"the output cannot be written: {error.strerror or error}",
        where=str(error.filename or out),
        remedy="put that right, or choose another folder with --out; nothing has to be made again",
    )


class Runner:
    """Makes artifacts of a plan available, each at most once.

    Attributes:
        made: What is available, by step id, inputs first.
    """

    def __init__(self, plan: Plan, session: Session, threads: int, display: Display) -> None:
        self.made: dict[str, Made] = {}
        self._plan, self._session = plan, session
        self._threads, self._display = threads, display

    def ensure(self, step: Step) -> Made:
        """Takes a step's artifact from the workspace, or runs the step and all it needs.

        What the plan found may have gone since, and another process may be making it right now:
        so the workspace is asked again, under the key's lock.

        Raises:
            PhiconvError: The stage failed; nothing of it is kept.
        """
        if step.id in self.made:
            return self.made[step.id]
        rebuild = step.state == "build" and self._plan.rebuild
        made = None if rebuild else self._find(step)
        if made is None:
            inputs = [self._path(source) for source in step.inputs]
            with self._session.lock(step.key, lambda: self._waiting(step)):
                found = None if rebuild else self._session.find(step.stage.produces, step.key)
                made = self._cached(step, found) if found else self._run(step, inputs)
        self.made[step.id] = made
        self._display.done(made.record)
        return made

    def _path(self, source: InputRef) -> Path:
        """Where an input is; it is made first if need be."""
        if source == self._plan.given:
            return source.path
        step = self._plan.step(source.id)
        entry = self.ensure(step).entry
        if not entry.is_lent:
            return entry.path
        with self._session.lock(step.key, lambda: self._waiting(step)):
            if take_back(self._session, entry) is not None:
                return entry.path
        # It was lent to an output, and changed or removed there since.
        del self.made[step.id]
        return self._path(source)

    def _find(self, step: Step) -> Made | None:
        with self._session.lock(step.key, lambda: self._waiting(step)):
            entry = self._session.find(step.stage.produces, step.key)
        return self._cached(step, entry) if entry else None

    def _waiting(self, step: Step) -> None:
        self._display.note(f"{step.id}: another process is building it, waiting")

    def _cached(self, step: Step, entry: Entry) -> Made:
        return Made(entry, _record(step, entry, None))

    def _run(self, step: Step, inputs: list[Path]) -> Made:
        unfinished = self._session.workspace.unfinished_work(step.key)
        if self._plan.rebuild:
            remove_tree(unfinished)
        with self._session.scratch() as folder, Meter() as meter:
            try:
                context = StageContext(
                    out=folder / ARTIFACT,
                    inputs=[
                        Artifact(ref.id, ref.kind, ref.key, path)
                        for ref, path in zip(step.inputs, inputs, strict=True)
                    ],
                    checkpoint=self._plan.checkpoint,
                    threads=self._threads,
                    progress=self._display.step(
                        step.id, step.stage.name, lambda: meter.peak_rss_bytes
                    ),
                    unfinished=unfinished,
                )
                _preload_stage(step.stage)
                facts = step.stage.run(step.params, context)
                usage = meter.usage()
                if step.stage.produces == ONNX:
                    kinds = tensor_kinds(context.out)
                    facts = {**facts, TENSOR_KINDS: [asdict(kind) for kind in kinds]}
                entry = self._session.publish(
                    self._entry(step, folder, facts, usage), context.digests
                )
            except (OSError, MemoryError, PhiconvError) as error:
                explained = _explained(error, step, folder)
                self._note_what_is_kept(explained, step, unfinished)
                raise explained from error
            except BaseException as stop:
                self._note_what_is_kept(stop, step, unfinished)
                raise
        remove_tree(unfinished)
        return Made(entry, _record(step, entry, usage))

    def _note_what_is_kept(self, error: BaseException, step: Step, unfinished: Path) -> None:
        """Adds to what ends a step whether the next build has to begin it again."""
        if unfinished.is_dir() and any(unfinished.iterdir()):
            build = "build without --rebuild" if self._plan.rebuild else "build"
            error.add_note(
                f"what stage {step.id!r} has done is kept: the next {build} goes on there"
            )
        elif not isinstance(error, Exception):
            error.add_note(f"finished stages are kept; {step.id!r} begins again in the next build")

    def _entry(self, step: Step, folder: Path, facts: Mapping[str, JSON], usage: Usage) -> Entry:
        return Entry(
            kind=step.stage.produces,
            key=step.key,
            step=step.id,
            stage=step.stage.name,
            recipe=self._plan.recipe.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            facts=facts,
            usage=asdict(usage),
            key_of=step.key_of,
            files={},
            folder=folder,
        )


_LIMITS = {
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or take a file system without one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit of open files",
    errno.EROFS: "set PHICONV_HOME to a folder that you can write",
    errno.EIO: "look at the system's log: a disk may be broken",
}
"""What the machine refuses whatever the stage does, and what to do about it."""


def _explained(error: Exception, step: Step, folder: Path) -> Exception:
    """The error to raise for what a stage raised: says which stage, and knows a full disk."""
    needed = step.estimate.disk_bytes if step.estimate else None
    where = f"stage {step.id!r} ({step.place})"
    full = disk_full(error, folder, needed)
    if full is not None:
        full.where = f"{where}, in {full.where}"
        return full
    if isinstance(error, MemoryError):
        about = size_text(machine.memory_bytes())
        message = f"out of memory ({about} in all): {error}"
        return EnvironmentLacksError(message, where=where, remedy="use a machine with more memory")
    if isinstance(error, OSError) and error.errno in _LIMITS:
        remedy = _LIMITS[error.errno]
        lacks = f"{where}: {error.filename}" if error.filename else where
        return EnvironmentLacksError(str(error.strerror), where=lacks, remedy=remedy)
    if isinstance(error, OSError):
        return StageError(f"{error.strerror or error}", where=f"{where}: {error.filename}")
    if isinstance(error, PhiconvError):
        error.where = f"{where}: {error.where}" if error.where else where
    return error


def _record(step: Step, entry: Entry, usage: Usage | None) -> StageRecord:
    return StageRecord(
        id=step.id,
        uses=step.stage.name,
        kind=step.stage.produces,
        key=step.key,
        cached=usage is None,
        wall_s=usage.wall_s if usage else None,
        cpu_s=usage.cpu_s if usage else None,
        peak_rss_bytes=usage.peak_rss_bytes if usage else None,
        size_bytes=entry.size_bytes,
        facts={name: value for name, value in entry.facts.items() if _is_scalar(value)},
    )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
