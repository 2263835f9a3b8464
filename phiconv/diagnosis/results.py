"""What a diagnosis finds, as plain frozen data; nothing here computes or reads a file.

Relative errors are norms of differences over norms of what is expected; KL divergences are in
nats, SQNR in dB. A figure that is not finite is None, and a flag or a note says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phiconv.report.results import Provenance, TokenSetRecord

DIAGNOSIS_SCHEMA = 1
"""Bumped whenever the form of `Diagnosis.to_json` changes."""

TensorStatus = Literal[
    "ok",
    "rescaled",
    "low",
    "corrupt",
    "wrong",
    "not finite",
    "misfit",
    "unreadable",
]


def place(layer: int | None, component: str) -> str:
    """A component with its layer, for people: `layer 3, mlp.down_proj`."""
    return component if layer is None else f"layer {layer}, {component}"


@dataclass(frozen=True)
class TensorError:
    """One weight of the artifact against the checkpoint's.

    Attributes:
        component: Such as `self_attn.q_proj`, `mlp.down_proj`, `input_layernorm`, `lm_head`.
        layer: Index of its layer, or None.
        initializer: Where it is stored in the artifact.
        format: How, for people: `int4 block 32`, `f16`.
        tensor: The checkpoint tensor it should equal.
        rows: First and last + 1 of that tensor's rows.
        sqnr_db: Signal to quantization noise ratio; None when the two are equal, or when there is
            nothing to compare (see `status`).
        expected_db: What plain rounding of this weight to this format has; None when exact.
        status: `ok`; `rescaled` channel by channel, as AWQ does, and else ok; `low`: well below
            what is expected; `corrupt` in a few blocks; `wrong` altogether; `not finite`;
            `misfit`: its shape is another; `unreadable`: stored in a way not known here.
        detail: Where it is worst, or what it holds instead; empty when ok.
    """

    component: str
    layer: int | None
    initializer: str
    format: str
    tensor: str
    rows: tuple[int, int]
    sqnr_db: float | None
    expected_db: float | None
    status: TensorStatus
    detail: str = ""

    @property
    def place(self) -> str:
        """Component with its layer."""
        return place(self.layer, self.component)

    @property
    def is_fault(self) -> bool:
        """Whether it is not what the format explains."""
        return self.status not in ("ok", "rescaled", "unreadable")


@dataclass(frozen=True)
class OperatorError:
    """One step of a layer, as the artifact ran it, against fp32 on the same inputs.

    Linear steps use the artifact's own weights, so this is the error of the graph and the runtime
    alone; that of the weights stands in `TensorError`.

    Attributes:
        component: Such as `input_layernorm`, `self_attn.rotary`, `self_attn.attention`,
            `mlp.residual`.
        layer: Index of its layer, or None.
        relative_error: None when the artifact's values are not finite.
        tolerance: What the types it computes in explain.
        largest: The greatest finite magnitude among its results.
        detail: What is not finite, and where it began; else empty.
    """

    component: str
    layer: int | None
    relative_error: float | None
    tolerance: float
    largest: float
    detail: str = ""

    @property
    def place(self) -> str:
        """Component with its layer."""
        return place(self.layer, self.component)

    @property
    def is_fault(self) -> bool:
        """Whether it is beyond what its types explain."""
        return self.relative_error is None or self.relative_error > self.tolerance


@dataclass(frozen=True)
class LayerError:
    """The residual stream after one layer; layer -1 is the embedding.

    Attributes:
        layer: Index of the layer.
        relative_error: Error of the artifact's residual stream after it, against the reference's.
        inherited: The same before it.
        added: Error of what the layer makes of the artifact's own input, against the reference's
            layer on that same input, relative to the residual stream: what this layer adds.
        attention: The same of its attention block, relative to what that block contributes.
        mlp: The same of its MLP.
    """

    layer: int
    relative_error: float | None
    inherited: float | None = None
    added: float | None = None
    attention: float | None = None
    mlp: float | None = None


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder from the reference to the artifact as it runs.

    Attributes:
        stage: Its name: `cast`, `quantized weights`, `graph`, ...
        description: What is computed, for people.
        on_path: Whether the artifact passed through it; else it is a yardstick.
        kl_mean: Mean KL divergence from the reference; None when not finite.
        kl_max: Greatest KL divergence.
        logit_error_max: Greatest absolute logit error.
        top1_agreement: Share of positions with the same first token.
        perplexity_ratio: Perplexity over the reference's.
        note: Why there are no figures, if there are none.
    """

    stage: str
    description: str
    on_path: bool
    kl_mean: float | None
    kl_max: float | None
    logit_error_max: float | None
    top1_agreement: float | None
    perplexity_ratio: float | None
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing that the graph's attributes, constants or wiring say otherwise than the config.

    Attributes:
        check: Which check: `norm epsilon`, `rotary cache`, `residual`, ...
        severity: `error` changes what the model computes; `warning` does so beyond some length,
            or cannot be decided.
        component: Such as `input_layernorm`, `self_attn.rotary`, `lm_head`.
        layers: Which layers; empty when it is not in a layer.
        message: What is wrong.
    """

    check: str
    severity: Literal["error", "warning"]
    component: str
    layers: tuple[int, ...]
    message: str


@dataclass(frozen=True)
class Fault:
    """A cause of error, named.

    Attributes:
        stage: The rung of the ladder at which it enters.
        component: Such as `mlp.down_proj`, `self_attn.rotary`, `lm_head`.
        layers: Which layers; empty when it is not in a layer.
        message: What is wrong, with the figures that show it.
        evidence: What else shows it.
    """

    stage: str
    component: str
    layers: tuple[int, ...]
    message: str
    evidence: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Component with its layers, for people."""
        if not self.layers:
            return self.component
        if len(self.layers) == 1:
            return place(self.layers[0], self.component)
        if len(self.layers) > 4 and self.layers[-1] - self.layers[0] == len(self.layers) - 1:
            return f"layers {self.layers[0]} to {self.layers[-1]}, {self.component}"
        return f"layers {', '.join(map(str, self.layers))}, {self.component}"


@dataclass(frozen=True)
class Diagnosis:
    """Where the error of an artifact comes from.

    Attributes:
        artifact: The artifact's folder.
        checkpoint: The source of the checkpoint it was compared with.
        tokens: The tokens everything was measured on.
        provenance: Where the artifact ran.
        ladder: From the reference to the artifact as it runs.
        layers: The residual stream, the embedding first.
        operators: Every step of every layer on the artifact's own inputs.
        tensors: Every weight.
        findings: What the graph says otherwise than the config.
        faults: The causes found, the gravest first; empty when there is no fault.
        verdict: One sentence.
    """

    artifact: str
    checkpoint: str
    tokens: TokenSetRecord
    provenance: Provenance
    ladder: tuple[Rung, ...]
    layers: tuple[LayerError, ...]
    operators: tuple[OperatorError, ...]
    tensors: tuple[TensorError, ...]
    findings: tuple[Finding, ...]
    faults: tuple[Fault, ...]
    verdict: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as JSON values, figures that are not finite as null."""
        document: dict[str, Any] = _plain(dataclasses.asdict(self))
        return {"schema": DIAGNOSIS_SCHEMA, **document}


def finite(value: float) -> float | None:
    """A figure as results keep it: None when it is not finite."""
    return float(value) + 0.0 if math.isfinite(value) else None  # + 0.0: no negative zero


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    return value
