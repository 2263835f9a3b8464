"""What a build found out, as plain frozen data: the input of every report and of `compare`.

`assessment.py` fills a `RunResult`; the modules beside this one turn it into report.json,
report.md, junit.xml and report.html. Nothing here computes, reads a file or imports another part
of phiconv.

Units are in the names: `_s` seconds, `_bytes` bytes; KL divergences are in nats. Digests carry
their algorithm (`sha256:…`, `blake3:…`). A float that is not finite is stored as None, so that the
JSON forms are valid JSON everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["passed", "failed", "not_run", "ungated"]
CheckState = Literal["clean", "warnings", "errors", "not_checked"]


@dataclass(frozen=True)
class FileRecord:
    """One file of the artifact, its path relative to the artifact's folder (POSIX)."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class CheckpointRecord:
    """The source checkpoint: `revision` is the Hub commit; `files` maps a name to its digest."""

    source: str
    digest: str
    revision: str | None = None
    architecture: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSetRecord:
    """The texts a measurement was made on: `windows` windows of `window_length` tokens."""

    name: str
    windows: int
    window_length: int
    text_digest: str
    ids_digest: str
    sources: tuple[str, ...] = ()

    def __str__(self) -> str:
        digest = self.ids_digest.removeprefix("sha256:")[:12]
        return f"{self.name} {self.windows}x{self.window_length} ({digest})"


@dataclass(frozen=True)
class Provenance:
    """Where and how the candidate's logits were computed.

    Attributes:
        runtime: Name in `phiconv.runtimes.RUNTIMES`, for example `onnxruntime`.
        runtime_version: Version of that runtime.
        target_provider: Execution provider the recipe asked for.
        provider: Execution provider that was used; None when nothing ran.
        device: Device name as the runtime or operating system gives it.
        driver: Driver version, where there is one.
        threads: Intra-op threads; None leaves the runtime's default.
        options: Session and provider options that were set.
        placement: Execution provider -> operator type -> number of nodes, from the runtime's own
            record after graph optimisation.
        strays: The MatMul and attention nodes among them that are not on `provider`, one line
            each: `MatMulNBits /lm_head/MatMulNBits on CPUExecutionProvider`.
    """

    runtime: str
    runtime_version: str
    target_provider: str
    provider: str | None
    device: str = ""
    driver: str | None = None
    threads: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    placement: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    strays: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Where it ran, in the verdict's own words (design.md, idea 4)."""
        if self.provider is None:
            return f"not run, target {self.target_provider} not present"
        if self.provider == self.target_provider:
            return f"on {self.provider}"
        return f"on {self.provider}, target {self.target_provider} not present"


@dataclass(frozen=True)
class Histogram:
    """Counts of positive values in logarithmic bins.

    `counts[i]` values lie in [10**edges[i], 10**edges[i + 1]); values below the first edge count in
    the first bin, values above the last edge in the last.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class PositionError:
    """KL divergence by position in the window, averaged over windows and over bins of positions.

    Bin i covers the positions [starts[i], starts[i + 1]), the last one up to the window's end.
    """

    starts: tuple[int, ...]
    mean: tuple[float | None, ...]
    p90: tuple[float | None, ...]


@dataclass(frozen=True)
class LayerErrorRecord:
    """The residual stream after one decoder layer against the reference's, on one short window.

    Attributes:
        layer: Index of the layer; -1 is the embedding.
        relative_error: |artifact - reference| / |reference| after it, Euclidean, over the window;
            None where it is not finite.
        own_error: The same of what the layer makes of the artifact's own input, against the
            reference's layer on that same input: the part that is not inherited. The embedding
            inherits nothing.
    """

    layer: int
    relative_error: float | None
    own_error: float | None


@dataclass(frozen=True)
class Check:
    """Something that was looked at besides the logits.

    Attributes:
        name: What: `placement`, `kernels`, `graph`, `tokenizer`, `chat template`, `genai_config`.
        state: `errors` are counted by `metrics`, on which there are built-in gates; `not_checked`
            when something it takes is missing here.
        summary: What was looked at and what came of it, in a few words.
        findings: One line each, the gravest first.
        metrics: The metrics that count its errors.
    """

    name: str
    state: CheckState
    summary: str
    findings: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownLimit:
    """Where a runtime's results are known to leave Hugging Face's, whatever the weights.

    Attributes:
        runtime: What it holds for: `llama.cpp`, `onnxruntime-genai`, or with the provider,
            `onnxruntime (DmlExecutionProvider)`.
        statement: What happens, in one sentence.
        from_position: The first position it holds from, counted from 0; 0 is every position.
    """

    runtime: str
    statement: str
    from_position: int


@dataclass(frozen=True)
class LengthProbe:
    """The error on both sides of a length at which the model begins to compute something else.

    Attributes:
        boundary: `sliding window` or `LongRoPE switch`.
        position: The first position beyond it, counted from 0.
        reached: By `prefill`, all tokens at once, or by `decoding`, each of these positions in a
            step of its own on the KV cache.
        positions: How many positions were compared on each side.
        kl_below, kl_above: Median KL divergence of the positions before it and from it on, nats.
        logit_error_below, logit_error_above: Greatest logit error there.
        departs: Whether the error is of another order than before the boundary by prefill.
        limit: The known limit that explains this; empty when none does, or nothing departs.
    """

    boundary: str
    position: int
    reached: Literal["prefill", "decoding"]
    positions: int
    kl_below: float | None
    kl_above: float | None
    logit_error_below: float | None
    logit_error_above: float | None
    departs: bool
    limit: str = ""


@dataclass(frozen=True)
class Measurement:
    """One artifact measured against the reference on one token set by one runtime.

    Attributes:
        status: `measured`, or `not_run` when the provider is missing and the recipe says `skip`.
        metrics: Metric name (a key of `phiconv.metrics.METRICS`) -> value; only those of static
            checks when not run.
        kl_histogram: Distribution of the KL divergence over all positions.
        kl_by_position: The same along the window.
        layers: Error by decoder layer, where it was measured.
        layers_note: Why it could not be measured, if it was to be.
        known_limits: Where the target runtime is known to leave the reference, by position.
        length_probes: The error before and after the lengths that matter, where it was measured.
    """

    status: Literal["measured", "not_run"]
    tokens: TokenSetRecord
    provenance: Provenance
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    kl_histogram: Histogram | None = None
    kl_by_position: PositionError | None = None
    checks: tuple[Check, ...] = ()
    layers: tuple[LayerErrorRecord, ...] = ()
    layers_note: str = ""
    known_limits: tuple[KnownLimit, ...] = ()
    length_probes: tuple[LengthProbe, ...] = ()


@dataclass(frozen=True)
class GateResult:
    """One gate judged: `bound` says whether `limit` is the least or the greatest value allowed.

    Attributes:
        built_in: Whether it holds because nobody set another: see `phiconv.gates.BUILT_IN`.
        detail: What the check found that the metric counts, shortened to a line; else empty.
        standard_error: Of what was measured; None where it is not known.
    """

    metric: str
    bound: Literal["min", "max"]
    limit: float
    measured: float | None
    passed: bool
    provider: str
    tokens: str
    built_in: bool = False
    detail: str = ""
    standard_error: float | None = None

    @property
    def close(self) -> bool:
        """Whether it passed by less than the standard error: other texts might turn it."""
        if not self.passed or self.measured is None or self.standard_error is None:
            return False
        return abs(self.measured - self.limit) < self.standard_error

    def __str__(self) -> str:
        measured, limit = self._figures()
        verb = "passed" if self.passed else "failed"
        detail = f": {self.detail}" if self.detail and not self.passed else ""
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        return (
            f"{verb}: {self.metric} measured {measured}{error}, limit {self.bound} {limit}, "
            f"provider {self.provider}, tokens {self.tokens}{detail}"
        )

    def _figures(self) -> tuple[str, str]:
        """Both in six digits, or in as many as it takes to tell them apart."""
        if self.measured is None or not math.isfinite(self.measured):
            return "not finite", f"{self.limit:.6g}"
        for digits in range(6, 18):
            measured, limit = f"{self.measured:.{digits}g}", f"{self.limit:.{digits}g}"
            if measured != limit or self.measured == self.limit:
                break
        return measured, limit


@dataclass(frozen=True)
class Validation:
    """One validate stage: what it measured and how the recipe's gates judge that.

    `gates` is what `phiconv.gates.judge` returns.
    """

    stage: str
    artifact: str
    measurement: Measurement
    gates: tuple[GateResult, ...] = ()

    @property
    def status(self) -> Status:
        """`not_run` never counts as passed; without gates but the built-in ones it is `ungated`."""
        if not all(gate.passed for gate in self.gates):
            return "failed"
        if self.measurement.status == "not_run":
            return "not_run"
        return "ungated" if all(gate.built_in for gate in self.gates) else "passed"

    @property
    def verdict(self) -> str:
        """One line: `passed on CPUExecutionProvider, target DmlExecutionProvider not present`."""
        where = self.measurement.provenance.where
        if self.measurement.status == "not_run":
            return f"failed before it ran; {where}" if self.status == "failed" else where
        return f"{'measured' if self.status == 'ungated' else self.status} {where}"


@dataclass(frozen=True)
class StageRecord:
    """One executed (or cached) stage.

    Attributes:
        id: Stage id in the recipe, or the id of an implicit stage.
        uses: Stage name, a key of `phiconv.stages.registry.STAGES`.
        kind: Kind of artifact it made.
        key: Its cache key.
        cached: True when the artifact was already in the workspace.
        wall_s, cpu_s, peak_rss_bytes: Cost; None for a cache hit.
        size_bytes: Size of the artifact in the workspace.
        facts: What the stage noted about its artifact (flat, JSON values as text or numbers).
    """

    id: str
    uses: str
    kind: str
    key: str
    cached: bool
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    size_bytes: int | None = None
    facts: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorKindRecord:
    """How one kind of weights is stored: `kind` such as `attention`, `mlp`, `lm_head`, `norm`.

    `format` is for people (`int4 block 32`, `f16`); `bits` is 8 * size_bytes / parameters, scales
    and zero points included.
    """

    kind: str
    format: str
    parameters: int
    size_bytes: int

    @property
    def bits(self) -> float:
        """Mean bits a parameter."""
        return 8 * self.size_bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class RunResult:
    """Everything one build found out; the reports need nothing else.

    Attributes:
        recipe: The recipe's name.
        recipe_digest: sha256 of the resolved recipe's canonical JSON.
        created: UTC time in ISO 8601, seconds.
        checkpoint: The source model.
        stages: In the order of execution, implicit ones included.
        artifact_key: Cache key of the artifact.
        files: The artifact's files.
        tensor_kinds: How the shipped weights are stored, when the writer says so.
        validations: One a validate stage, in the recipe's order.
        tools: Distribution name -> version, of everything that shaped bytes or figures.
        machine: For people: operating system, processor, memory.
        release_path: Where the recipe ships its artifact, if it says.
    """

    recipe: str
    recipe_digest: str
    created: str
    checkpoint: CheckpointRecord
    stages: tuple[StageRecord, ...]
    artifact_key: str
    files: tuple[FileRecord, ...] = ()
    tensor_kinds: tuple[TensorKindRecord, ...] = ()
    validations: tuple[Validation, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    release_path: str | None = None

    @property
    def status(self) -> Status:
        """`failed` if any validation failed, else `not_run` if any did not run, and so on."""
        found = {validation.status for validation in self.validations}
        order: tuple[Status, ...] = ("failed", "not_run", "passed")
        return next((status for status in order if status in found), "ungated")

    @property
    def size_bytes(self) -> int:
        """Size of the artifact."""
        return sum(file.size_bytes for file in self.files)
