"""Stage `validate`: an artifact's logits against the reference's, on the same tokens.

Kernels, tokenizer, chat template and genai_config.json are checked as well, also where no model
can be run. The gates are no part of what is measured: `phiconv.gates.judge` applies them
afterwards, so a changed limit never runs a model again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, PhiconvError, RecipeError
from phiconv.stages.generation import PROMPT_TOKENS
from phiconv.stages.reference import Reference, TokenSetParams, check_tokens
from phiconv.stages.stage import (
    GGUF,
    JSON,
    MEASUREMENT,
    ONNX,
    REFERENCE,
    Estimate,
    InputRef,
    Prerequisite,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phiconv.checkpoint import ModelConfig
    from phiconv.report.results import Measurement
    from phiconv.runtimes.providers import ProviderChoice
    from phiconv.runtimes.stored_reference import StoredReference
    from phiconv.stages.checks import Checked


# measurement.json, and what positions.npz has of each position: a float32, two float64, a bool.
_MEASUREMENT_BYTES = 12_000
_POSITION_BYTES = 21


class Gate(BaseModel):
    """The values of a metric that pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: float | None = Field(None, description="Least value that passes.")
    max: float | None = Field(None, description="Greatest value that passes.")


class ValidateParams(TokenSetParams):
    """Parameters of `validate`."""

    provider: Literal["cpu", "cuda", "dml"] = Field(
        "cpu",
        description="Execution provider to run on: CPUExecutionProvider, CUDAExecutionProvider "
        "or DmlExecutionProvider.",
    )
    when_missing: Literal["require", "fallback-cpu", "skip"] = Field(
        "require",
        description="What happens on a machine without the provider: require ends with exit code "
        "5, fallback-cpu runs the same graph on the CPU and says so, skip runs nothing, which "
        "never counts as passed. With runtime: llama.cpp it is llama.cpp that may be missing, and "
        "fallback-cpu measures the dequantized weights in PyTorch.",
    )
    runtime: Literal["onnxruntime", "onnxruntime-genai", "llama.cpp"] = Field(
        "onnxruntime",
        description="What runs the artifact; onnxruntime-genai also decodes token by token and "
        "generates, as does llama.cpp, which is for GGUF files.",
    )
    generate_tokens: int = Field(
        64,
        ge=1,
        description="Tokens of the greedy generation, with runtime: onnxruntime-genai or "
        "llama.cpp.",
    )
    layer_errors: bool = Field(
        True,
        description="Also measure the error of every layer, on the first 128 tokens; of a GGUF "
        "file inside llama.cpp.",
    )
    weight_errors: bool = Field(
        True,
        description="Also compare every weight with the checkpoint's.",
    )
    length_probes: bool = Field(
        False,
        description="Also compare on both sides of the sliding window and of LongRoPE's switch, "
        "by prefill and by decoding across; takes two texts of that length.",
    )
    gates: dict[str, Gate] = Field(
        default_factory=dict,
        description="Metric name to the least (min) and greatest (max) value that passes.",
    )

    @property
    def generates(self) -> bool:
        """Whether the runtime decodes by itself."""
        return self.runtime != "onnxruntime"

    def limits(self) -> dict[str, dict[Literal["min", "max"], float]]:
        """The gates as `phiconv.gates` takes them."""
        limits: dict[str, dict[Literal["min", "max"], float]] = {}
        for name, gate in self.gates.items():
            limits[name] = {}
            if gate.min is not None:
                limits[name]["min"] = gate.min
            if gate.max is not None:
                limits[name]["max"] = gate.max
        return limits


class Validate:
    """Measures the artifact; makes measurement.json and the per-position values."""

    name: ClassVar[str] = "validate"
    version: ClassVar[int] = 14
    params: ClassVar[type[ValidateParams]] = ValidateParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX, GGUF)
    produces: ClassVar[str] = MEASUREMENT

    def tools(self) -> tuple[str, ...]:
        return (
            "numpy",
            "onnx-ir",
            "onnxruntime",
            "onnxruntime-genai",
            "tokenizers",
            "torch",
            "transformers",
        )

    def check(self, params: ValidateParams, config: ModelConfig) -> list[PhiconvError]:
        from phiconv.gates import check_gates

        errors = check_tokens(params, config, self.name)
        if params.runtime == "llama.cpp" and params.provider != "cpu":
            errors.append(
                RecipeError(
                    f"runtime llama.cpp has no provider {params.provider}",
                    where=f"{self.name}: provider",
                    remedy="take the provider out: llama.cpp runs on the CPU here",
                )
            )
        if (
            params.generates
            and PROMPT_TOKENS + params.generate_tokens > config.max_position_embeddings
        ):
            errors.append(
                RecipeError(
                    f"generate_tokens {params.generate_tokens} after a prompt of {PROMPT_TOKENS} "
                    f"exceeds the model's context of {config.max_position_embeddings}",
                    where=f"{self.name}: generate_tokens",
                )
            )
        errors += check_gates(
            params.limits(), generates=params.generates, where=f"{self.name}: gates"
        )
        return errors

    def check_inputs(self, params: ValidateParams, kinds: Sequence[str]) -> list[PhiconvError]:
        """A GGUF file is run by llama.cpp, and nothing else is."""
        if (GGUF in kinds) == (params.runtime == "llama.cpp"):
            return []
        fitting = "llama.cpp" if GGUF in kinds else "onnxruntime or onnxruntime-genai"
        return [
            RecipeError(
                f"runtime {params.runtime} does not run an artifact of kind {kinds[0]}",
                where=f"{self.name}: runtime",
                remedy=f"set runtime: {fitting}",
            )
        ]

    def key_params(self, params: ValidateParams) -> dict[str, JSON]:
        target = _target(params)
        try:
            provider = _choose(params).provider
        except EnvironmentLacksError:
            provider = target  # the plan says what is missing; nothing will be made
        key: dict[str, JSON] = {"runtime": params.runtime, "target": target, "provider": provider}
        if params.length_probes:
            key["length_probes"] = True
        if params.generates:
            key["generate_tokens"] = params.generate_tokens
        if params.runtime == "llama.cpp":
            key["binding"] = machine.llama_cpp_binding()
            key["gguf"] = machine.version("gguf")
        key["layer_errors"] = params.layer_errors
        key["weight_errors"] = params.weight_errors
        return key

    def requires(self, params: ValidateParams) -> tuple[Requirement, ...]:
        from phiconv.runtimes.llama_cpp_library import REMEDY
        from phiconv.runtimes.providers import INSTALL, PROVIDERS, REMEDIES

        optional = params.when_missing != "require"
        if params.runtime == "llama.cpp":
            return (Requirement("binding", machine.LLAMA_CPP, optional, REMEDY),)
        remedy = (INSTALL if optional else REMEDIES)[params.provider]
        needed = [Requirement("provider", PROVIDERS[params.provider], optional, remedy)]
        if params.runtime == "onnxruntime-genai":
            remedy = INSTALL[params.provider]
            needed.append(Requirement("module", "onnxruntime_genai", remedy=remedy))
        return tuple(needed)

    def preload(self) -> None:
        """Imports what the reference, which comes before it, needs."""
        Reference().preload()

    def prerequisites(self, params: ValidateParams) -> tuple[Prerequisite, ...]:
        """The reference on the same tokens, and that of the length probes."""
        shared = params.model_dump(mode="json", include=set(TokenSetParams.model_fields))
        needed = [Prerequisite("reference", "reference", shared)]
        if params.length_probes:
            texts = {name: shared[name] for name in ("tokens", "reference_device")}
            needed.append(Prerequisite("length-reference", "length-reference", texts))
        return tuple(needed)

    def estimate(
        self, params: ValidateParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """A measurement is small; the memory, see `phiconv.stages.validation_memory`."""
        from phiconv.stages.validation_memory import peak_bytes

        positions = params.windows * params.window_length
        disk_bytes = _MEASUREMENT_BYTES + _POSITION_BYTES * positions
        return Estimate(disk_bytes, peak_bytes(params, config, inputs))

    def run(self, params: ValidateParams, ctx: StageContext) -> dict[str, JSON]:
        from dataclasses import replace

        from phiconv.report.document import MEASUREMENT_FILE, measurement_json
        from phiconv.report.results import Measurement, Provenance
        from phiconv.runtimes.stored_reference import load_reference
        from phiconv.stages.known_limits import known_limits
        from phiconv.stages.logits import measure

        choice = _choose(params)
        reference = load_reference(ctx.input(REFERENCE).path)
        ctx.progress.start(int(reference.windows.size), "tokens")
        ctx.progress.advance(0, "kernels, tokenizer, template")
        static = _check_statically(params, choice, ctx)
        limits = known_limits(_artifact(params, ctx), ctx.checkpoint.config, choice.target)
        if choice.provider is None:
            nowhere = Provenance(params.runtime, "", choice.target, None)
            measurement = Measurement("not_run", reference.tokens, nowhere)
        else:
            with static.explaining_failures():
                artifact = _artifact(params, ctx)
                measurement = measure(artifact, params, choice, reference, limits, ctx)
                measurement = _with_layers(measurement, params, reference, ctx)
        measurement = replace(_with_checks(measurement, static, params, ctx), known_limits=limits)
        text = measurement_json(measurement)
        (ctx.out / MEASUREMENT_FILE).write_text(text, encoding="utf-8", newline="\n")
        return {
            "status": measurement.status,
            "provider": measurement.provenance.provider,
            "tokens": int(reference.windows.size),
        }


def _target(params: ValidateParams) -> str:
    from phiconv.runtimes.providers import PROVIDERS

    return machine.LLAMA_CPP if params.runtime == "llama.cpp" else PROVIDERS[params.provider]


def _choose(params: ValidateParams) -> ProviderChoice:
    from phiconv.runtimes.providers import choose, choose_llama_cpp

    if params.runtime == "llama.cpp":
        return choose_llama_cpp(params.when_missing)
    return choose(params.provider, params.when_missing)


def _artifact(params: ValidateParams, ctx: StageContext) -> Path:
    return ctx.input(GGUF if params.runtime == "llama.cpp" else ONNX).path


def _check_statically(params: ValidateParams, choice: ProviderChoice, ctx: StageContext) -> Checked:
    from phiconv.diagnosis.diagnose import artifact_weights
    from phiconv.diagnosis.diagnose_gguf import gguf_weights
    from phiconv.stages.checks import check_gguf, check_statically, check_weights, joined

    artifact, checkpoint = _artifact(params, ctx), ctx.checkpoint
    if params.runtime == "llama.cpp":
        static, weights = check_gguf(artifact, checkpoint), gguf_weights
    else:
        static = check_statically(artifact, checkpoint, params.provider, choice.target)
        weights = artifact_weights
    if not params.weight_errors:
        return static
    compared = check_weights(
        lambda: weights(artifact, checkpoint),
        checkpoint,
        threads=ctx.threads,
        progress=ctx.progress,
    )
    return joined([static, compared])


def _with_checks(
    measurement: Measurement, static: Checked, params: ValidateParams, ctx: StageContext
) -> Measurement:
    """The measurement with what was checked in it: placement and length probes, too."""
    from dataclasses import replace

    from phiconv.stages import length_probes
    from phiconv.stages.checks import check_placement, joined

    parts = [static]
    if measurement.status == "measured" and measurement.provenance.runtime != "llama.cpp":
        parts.insert(0, check_placement(measurement.provenance))
    if measurement.status == "measured" and params.length_probes:
        config = ctx.checkpoint.config
        parts.append(length_probes.checked(measurement.length_probes, config))
    found = joined(parts)
    metrics = {**measurement.metrics, **found.counts}
    return replace(measurement, metrics=metrics, checks=found.checks)


def _with_layers(
    measurement: Measurement,
    params: ValidateParams,
    reference: StoredReference,
    ctx: StageContext,
) -> Measurement:
    """The measurement with the error of every layer; the runtime's session is gone by now."""
    from dataclasses import replace

    from phiconv.runtimes.providers import DEQUANTIZED
    from phiconv.stages.layer_errors import measure

    provider = measurement.provenance.provider
    if not params.layer_errors or provider is None or provider == DEQUANTIZED:
        return measurement
    ctx.progress.advance(0, "layers")
    layers, note = measure(
        _artifact(params, ctx),
        ctx.checkpoint,
        reference.windows,
        provider=provider,
        threads=ctx.threads,
    )
    return replace(measurement, layers=layers, layers_note=note)
