"""What a stage is, and what the engine hands to one.

A stage is an instance of a small class with the attributes and methods of `Stage`. Its module
imports only the standard library, pydantic, `phiconv.errors` and this module at the top level, so
that `phiconv plan` and `phiconv schema` stay fast; everything heavy is imported inside `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.errors import PhiconvError

JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

ONNX_GRAPH = "onnx-graph"
"""A lazy ONNX model: graph.onnx, weights.json, genai/ (a few hundred KB)."""
ONNX = "onnx"
"""What ships: model.onnx, model.onnx.data, genai_config.json, tokenizer files."""
GGUF = "gguf"
"""What ships for llama.cpp: one .gguf file."""
IMATRIX = "imatrix"
"""An importance matrix: imatrix.gguf, as llama-imatrix writes it."""
OVERLAY = "overlay"
"""What AWQ and GPTQ found: overlay.json, overlay.safetensors, maybe rounded.safetensors."""
AWQ_CHECKPOINT = "awq-checkpoint"
"""A Hugging Face checkpoint in AutoAWQ's format."""
REFERENCE = "reference"
"""The Hugging Face fp32 reference over one token set."""
LENGTH_REFERENCE = "length-reference"
"""The same around the lengths at which the model begins to compute something else."""
MEASUREMENT = "measurement"
"""measurement.json: the metrics of one artifact against its reference."""


@dataclass(frozen=True)
class Artifact:
    """A finished, read-only artifact of the workspace.

    Attributes:
        id: The id of the step that made it (unique in the recipe).
        kind: What the folder holds, such as `ONNX`.
        key: The step's cache key, 64 hexadecimal digits.
        path: The folder.
    """

    id: str
    kind: str
    key: str
    path: Path


@dataclass(frozen=True)
class InputRef:
    """An input as it is known at plan time.

    Attributes:
        id: The id of the step that makes it.
        kind: What the folder holds.
        key: That step's cache key.
        path: The folder; it exists only when the input is a cache hit.
        made_by: Stage name and parameters of every step that led to it, inputs first: what an
            estimate needs to know, such as the bits of a quantization.
    """

    id: str
    kind: str
    key: str
    path: Path
    made_by: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Requirement:
    """Something a stage needs of the machine.

    Attributes:
        kind: `provider` for an ONNX Runtime execution provider, `module` for an importable
            Python module, `binding` for a package that carries llama.cpp.
        name: Such as `CUDAExecutionProvider`, `onnxruntime_genai` or `llama.cpp`.
        optional: True when the stage has a declared way to go on without it (a validation with
            `when_missing: fallback-cpu`); the plan shows it, the build goes on. A missing
            requirement that is not optional ends the build with exit code 5 before any work.
        remedy: What the user can do about it.
    """

    kind: Literal["provider", "module", "binding"]
    name: str
    optional: bool = False
    remedy: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to need: bytes of its artifact on disk and peak RAM in bytes."""

    disk_bytes: int = 0
    ram_bytes: int = 0


@dataclass(frozen=True)
class Prerequisite:
    """A step a stage wants the plan to add: `uses` applied to the checkpoint with `params`.

    Its artifact is appended to `StageContext.inputs` after those of `from`. Two stages that ask
    for the same one (equal key) share it.
    """

    id: str
    uses: str
    params: Mapping[str, JSON]


class Progress(Protocol):
    """Where a stage reports how far it is; every call is thread-safe."""

    def start(self, total: int | None, unit: str = "bytes") -> None:
        """Begins a phase of `total` units (None when unknown), such as bytes or tokens."""

    def advance(self, amount: int, what: str | None = None) -> None:
        """Adds `amount` units done; `what` names the tensor or item in hand."""

    def note(self, text: str) -> None:
        """Says one line to the user that is worth reading now."""


class SilentProgress:
    """A `Progress` that says nothing."""

    def start(self, total: int | None, unit: str = "bytes") -> None:
        """Does nothing."""

    def advance(self, amount: int, what: str | None = None) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""


@dataclass(frozen=True)
class StageContext:
    """What `Stage.run` gets.

    Attributes:
        out: An empty temporary folder: the artifact is written here and published atomically by
            the engine afterwards.
        inputs: The input artifacts in the order of `from`, then those of prerequisites.
        checkpoint: The opened source checkpoint.
        threads: How many threads the stage may use; never shapes the output bytes.
        progress: Where to report progress.
        digests: sha256 (hexadecimal) by path relative to `out`, of files whose digest the stage
            came to know while it wrote them; see `record_digest`.
        unfinished: Where a long stage keeps what it has done so far: a folder of this step alone
            that is there again, as it was left, when the step is run after a kill, and is removed
            once the artifact is published. The stage makes it; None where nothing can be kept.
    """

    out: Path
    inputs: Sequence[Artifact]
    checkpoint: Checkpoint
    threads: int = 1
    progress: Progress = field(default_factory=SilentProgress)
    digests: dict[str, str] = field(default_factory=dict)
    unfinished: Path | None = None

    def record_digest(self, relative_path: str, sha256: str) -> None:
        """Hands over the sha256 of a file written to `out`, so that it is not read again.

        Raises:
            ValueError: The path is absolute or leaves `out`, or the digest is not 64 lower-case
                hexadecimal digits.
        """
        path = PurePosixPath(relative_path)
        if path.is_absolute() or ".." in path.parts or "\\" in relative_path:
            raise ValueError(f"not a path inside the artifact: {relative_path!r}")
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise ValueError(f"not a sha256 in hexadecimal: {sha256!r}")
        self.digests[path.as_posix()] = sha256

    def input(self, kind: str) -> Artifact:
        """Returns the one input of `kind`.

        Raises:
            ValueError: There is none, or there are several.
        """
        found = [artifact for artifact in self.inputs if artifact.kind == kind]
        if len(found) != 1:
            kinds = ", ".join(artifact.kind for artifact in self.inputs) or "none"
            raise ValueError(f"wanted one input of kind {kind!r}, the inputs are: {kinds}")
        return found[0]


class Stage(Protocol):
    """One operation of a recipe: maps input artifacts (or the checkpoint) to an artifact."""

    @property
    def name(self) -> str:
        """What a recipe writes after `uses`."""
        ...

    @property
    def version(self) -> int:
        """Bumped whenever the output bytes change for equal inputs and parameters."""
        ...

    @property
    def params(self) -> type[BaseModel]:
        """The pydantic model of `with`: `extra="forbid"`, frozen.

        Its field descriptions are the documentation and the JSON schema. Values that name a file
        are resolved against `info.context["folder"]` (the recipe's folder) in a validator.
        """
        ...

    @property
    def accepts(self) -> tuple[str, ...]:
        """Kinds of the inputs it takes, one of each; empty when it reads the checkpoint itself.

        An `onnx-graph` given to a stage that accepts `onnx` is written first: the plan adds a
        step `<id>.onnx`.
        """
        ...

    @property
    def produces(self) -> str:
        """The kind of its artifact."""
        ...

    def tools(self) -> tuple[str, ...]:
        """Names of the distributions whose versions shape the output bytes."""
        ...

    def check(self, params: Any, config: ModelConfig) -> list[PhiconvError]:
        """Finds what cannot work, at plan time and without a heavy import; [] when all is well."""
        ...

    def key_params(self, params: Any) -> dict[str, JSON]:
        """The parameters that shape the output; files by digest, never by path."""
        ...

    def requires(self, params: Any) -> tuple[Requirement, ...]:
        """What the machine must have."""
        ...

    def run(self, params: Any, ctx: StageContext) -> dict[str, JSON]:
        """Writes the artifact to `ctx.out`.

        Returns:
            Facts for the artifact's manifest (tensor counts, bytes); deterministic.

        Raises:
            StageError: The artifact could not be made; nothing is cached.
            EnvironmentLacksError: The machine lacks something.
        """
        ...


@runtime_checkable
class Estimating(Protocol):
    """A stage that can say at plan time what it will need."""

    def estimate(self, params: Any, config: ModelConfig, inputs: Sequence[InputRef]) -> Estimate:
        """The expected size of the artifact and the peak RAM of `run`, in bytes."""
        ...


@runtime_checkable
class OptionalInputs(Protocol):
    """A stage that takes more inputs than it needs."""

    @property
    def accepts_also(self) -> tuple[str, ...]:
        """Kinds of which it takes one besides those of `accepts`, where `from` names it."""
        ...


@runtime_checkable
class InputFitting(Protocol):
    """A stage whose parameters must fit what its inputs were made with."""

    def check_fit(
        self, params: Any, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> list[PhiconvError]:
        """Finds what cannot work with inputs made by these steps; [] when all is well."""
        ...


@runtime_checkable
class InputChecking(Protocol):
    """A stage whose parameters fit only some of the kinds that it accepts."""

    def check_inputs(self, params: Any, kinds: Sequence[str]) -> list[PhiconvError]:
        """Finds what cannot work with inputs of these kinds; [] when all is well."""
        ...


@runtime_checkable
class Preloading(Protocol):
    """A stage whose imports take seconds, which can pass while the checkpoint is hashed."""

    def preload(self) -> None:
        """Imports what `run` needs; called before it, also from another thread."""
        ...


@runtime_checkable
class Prerequisites(Protocol):
    """A stage that needs another stage's artifact which the recipe does not spell out."""

    def prerequisites(self, params: Any) -> tuple[Prerequisite, ...]:
        """The steps to add before this one, such as the reference of a validation."""
        ...


@runtime_checkable
class Gated(Protocol):
    """Parameters, of a stage that makes a measurement, that say what passes."""

    def limits(self) -> dict[str, dict[Literal["min", "max"], float]]:
        """Metric name -> `min` and `max` -> limit."""
        ...
