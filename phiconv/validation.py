"""Validates and diagnoses an artifact wherever it lies, also one phiconv did not make.

A validation goes the way of a recipe with one stage, `validate`, whose input is the artifact as it
lies there: nothing of it is copied. Its key is the digest of its files, so that reference and
measurement are found in the workspace the next time, and other gates judge without running a model
again.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from phiconv.assessment import Shipped, assess, measurement_folders
from phiconv.batch import DIST, Outcome
from phiconv.cache_key import digest
from phiconv.errors import PhiconvError, Problems, RecipeError, StageError
from phiconv.inspect import tensor_kinds
from phiconv.plan import Plan, make_plan
from phiconv.preflight import preflight
from phiconv.progress import Display
from phiconv.recipe.model import ModelSource, Recipe, RecipeText, StageEntry, StageUse
from phiconv.report.results import FileRecord, RunResult
from phiconv.resources import Meter
from phiconv.run import Built, Runner, open_checkpoint
from phiconv.stages.stage import GGUF, ONNX, InputRef
from phiconv.stages.validate import Validate, ValidateParams
from phiconv.workspace import Session, Workspace
from phiconv.workspace.session import open_session
from phiconv.workspace.store import remove_tree

if TYPE_CHECKING:
    from phiconv.diagnosis import Diagnosis
    from phiconv.runtimes.providers import ProviderChoice

ARTIFACT, STAGE = "artifact", "validate"
_PLACE = "command line"
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Subject:
    """What is to be validated, and against what.

    Attributes:
        artifact: The folder of the ONNX model, or the model's file; or a GGUF file, or a folder
            with one.
        source: The checkpoint it was made from: a folder or a Hub id.
        revision: Revision of a Hub model.
        params: How it is measured, and the gates.
    """

    artifact: Path
    source: str
    revision: str | None
    params: ValidateParams

    @property
    def name(self) -> str:
        """Names the reports: the folder, or for `dist/NAME/artifact` that NAME."""
        path = self.artifact.resolve()
        path = path.parent if path.suffix == ".onnx" else path
        path = path.with_suffix("") if path.suffix == ".gguf" else path
        name = path.parent.name if path.name == ARTIFACT else path.name
        return _NOT_IN_A_NAME.sub("-", name).strip("-._") or ARTIFACT


def validate_artifact(
    subject: Subject,
    workspace: Workspace,
    display: Display,
    *,
    out: Path | None = None,
    threads: int = 1,
    rebuild: bool = False,
) -> Outcome:
    """Measures an artifact against its checkpoint and writes the four reports.

    Args:
        subject: What to validate.
        workspace: Keeps the reference and the measurement.
        display: Where progress is shown.
        out: Folder of the reports; by default `dist/<name>-validation`.
        threads: How many threads a stage may use.
        rebuild: Measure again, whatever the workspace has.

    Raises:
        RecipeError: There is no such folder, or a parameter or gate is wrong.
        StageError: The artifact is broken, is no decoder, or is not of this checkpoint.
        EnvironmentLacksError: The provider, a package or the checkpoint is missing.
    """
    out = out or DIST / f"{subject.name}-validation"
    with open_session(workspace) as session:
        measured = _measure(subject, session, display, out, threads, rebuild)
        _write(measured.result, measured.folders, out, session)
    return Outcome(
        measured.plan.recipe, Built(measured.plan, measured.result, measured.artifact, out), None
    )


def judge_artifact(
    subject: Subject, workspace: Workspace, display: Display, *, threads: int = 1
) -> RunResult:
    """What `validate_artifact` finds out, without a report.

    Args:
        subject: What to validate.
        workspace: Keeps the reference and the measurement.
        display: Where progress is shown.
        threads: How many threads a stage may use.

    Raises:
        PhiconvError: As `validate_artifact`.
    """
    with open_session(workspace) as session:
        return _measure(subject, session, display, workspace.artifacts, threads, False).result


class _Measured(NamedTuple):
    """A validation that is done: its plan, what it found, and where the measurements lie."""

    plan: Plan
    result: RunResult
    folders: Mapping[str, Path]
    artifact: Path


def _measure(
    subject: Subject, session: Session, display: Display, out: Path, threads: int, rebuild: bool
) -> _Measured:
    """Measures an artifact; `out` is only asked for room."""
    workspace = session.workspace
    found = _find(subject.artifact)
    recipe = _recipe(subject)
    _raise(Validate().check_inputs(subject.params, (found.kind,)))
    checkpoint = open_checkpoint(recipe, workspace, display, download=True, preload=True)
    _check_vocabulary(found, checkpoint.config.vocab_size)
    files = _hash(found, workspace, display)
    given = InputRef(ARTIFACT, found.kind, _key(found.kind, files), found.path)
    plan = make_plan(recipe, checkpoint, workspace, rebuild=rebuild, given=given)
    preflight([(plan, out)], workspace)
    display.begin(f"validating {recipe.name}", len(plan.at_hand))
    runner = Runner(plan, session, threads, display)
    for step in plan.at_hand:
        runner.ensure(step)
    shipped = Shipped(given.key, files, tensor_kinds(found.path))
    result = assess(plan, runner.made, shipped)
    return _Measured(plan, result, measurement_folders(plan, runner.made), found.path)


def default_runtime(artifact: Path) -> str:
    """What runs an artifact when nobody says: `onnxruntime`, or `llama.cpp` for a GGUF file."""
    return "llama.cpp" if _is_gguf(artifact) else "onnxruntime"


def diagnose_artifact(
    subject: Subject, workspace: Workspace, display: Display, *, threads: int = 1
) -> Diagnosis:
    """Finds where the error of an artifact comes from.

    Args:
        subject: What to diagnose; of its parameters, provider and tokens count.
        workspace: Keeps digests of the checkpoint's files.
        display: Where progress is shown.
        threads: How many threads may be used.

    Raises:
        RecipeError: There is no such folder, or the tokens are wrong.
        StageError: The artifact is broken or no decoder.
        EnvironmentLacksError: The provider, a package or the checkpoint is missing.
    """
    from phiconv.tokens import load_token_set

    params = subject.params
    path, provider, diagnose = _how(subject)
    checkpoint = open_checkpoint(_recipe(subject), workspace, display, download=True, preload=True)
    tokens = load_token_set(
        params.tokens,
        checkpoint,
        windows=params.windows,
        window_length=params.window_length,
    )
    with Meter() as meter:
        return diagnose(
            path,
            checkpoint,
            provider=provider,
            tokens=tokens,
            threads=threads,
            progress=display.step("diagnosis", str(path), lambda: meter.peak_rss_bytes),
        )


def _how(subject: Subject) -> tuple[Path, ProviderChoice, Callable[..., Diagnosis]]:
    """What is diagnosed, where it runs, and what diagnoses such an artifact."""
    from phiconv.runtimes.providers import choose, choose_llama_cpp

    params = subject.params
    found = _find(subject.artifact)
    if found.kind == ONNX:
        from phiconv.diagnosis.diagnose import diagnose

        return found.path, choose(params.provider, params.when_missing), diagnose
    from phiconv.diagnosis.diagnose_gguf import diagnose_gguf

    if params.provider != "cpu":
        raise RecipeError(
            f"llama.cpp has no provider {params.provider}",
            where="--provider",
            remedy="leave it out: llama.cpp runs on the CPU here",
        )
    return found.path, choose_llama_cpp(params.when_missing), diagnose_gguf


def _recipe(subject: Subject) -> Recipe:
    """The recipe that says what the command line does."""
    params = subject.params
    values = params.model_dump(mode="json", exclude_defaults=True)
    if "tokens" in values:
        values["tokens"] = Path(params.tokens).name  # a recipe's digest depends on no path
    entry = StageEntry.model_validate(
        {"id": STAGE, "uses": Validate.name, "from": ARTIFACT, "with": values}
    )
    text = RecipeText(
        schema=1,
        name=subject.name,
        model=ModelSource(source=subject.source, revision=subject.revision),
        stages=(entry,),
    )
    use = StageUse(STAGE, Validate(), params, (ARTIFACT,), _PLACE)
    written = json.dumps(text.model_dump(mode="json"), sort_keys=True)
    text_sha256 = hashlib.sha256(written.encode()).hexdigest()
    return Recipe(text, Path(_PLACE), text_sha256, subject.source, (use,))


@dataclass(frozen=True)
class _Found:
    """An artifact as it lies there.

    Attributes:
        kind: `onnx` or `gguf`.
        path: What the stages get: the ONNX model's folder, or the GGUF file.
        folder: The folder that `files` are in.
        files: Every file that shapes the measurement.
        vocab_size: Width of the logits, where it can be told beforehand.
    """

    kind: str
    path: Path
    folder: Path
    files: tuple[str, ...]
    vocab_size: int | None = None


def _find(artifact: Path) -> _Found:
    if _is_gguf(artifact):
        from phiconv.runtimes.llama_cpp import gguf_file

        file = gguf_file(artifact)
        return _Found(GGUF, file, file.parent, (file.name,))
    from phiconv.onnx.folder import open_folder

    folder = open_folder(artifact)
    return _Found(ONNX, folder.path, folder.path, folder.files, folder.vocab_size)


def _is_gguf(artifact: Path) -> bool:
    if artifact.is_file():
        return artifact.suffix == ".gguf"
    return any(artifact.glob("*.gguf")) and not any(artifact.glob("*.onnx"))


def _raise(errors: Sequence[PhiconvError]) -> None:
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(list(errors))


def _check_vocabulary(found: _Found, vocab_size: int) -> None:
    if found.vocab_size not in (None, vocab_size):
        raise StageError(
            f"the artifact's vocabulary is {found.vocab_size}, the checkpoint's is {vocab_size}",
            where=str(found.path),
            remedy="give the checkpoint the artifact was made from with --reference",
        )


def _hash(found: _Found, workspace: Workspace, display: Display) -> tuple[FileRecord, ...]:
    """The artifact's files with their digests, those not known yet hashed."""
    from phiconv.checkpoint import DigestCache
    from phiconv.checkpoint.digests import digest_files

    paths = [found.folder / name for name in found.files]
    sizes = [path.stat().st_size for path in paths]
    progress = display.step(ARTIFACT, str(found.path), lambda: 0)
    progress.start(sum(sizes))
    digests = digest_files(
        paths,
        cache=DigestCache(workspace.digests),
        on_bytes=lambda count: progress.advance(count, "hashing"),
    )
    return tuple(map(FileRecord, found.files, sizes, digests))


def _key(kind: str, files: tuple[FileRecord, ...]) -> str:
    return digest({"artifact": kind, "files": {file.path: file.digest for file in files}})


def _write(
    result: RunResult, measurements: Mapping[str, Path], out: Path, session: Session
) -> None:
    """Puts the reports into `out`, each whole or not at all, whatever else is there."""
    from phiconv.report import write_reports

    out.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()
    with session.workspace.lock(f"out-{name}"):
        new = Path(tempfile.mkdtemp(prefix=".phiconv-", dir=out))
        try:
            write_reports(result, new, measurements)
            for file in sorted(new.iterdir()):
                file.replace(out / file.name)
        finally:
            remove_tree(new)
