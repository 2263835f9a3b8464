"""Stage `convert-gguf`: a checkpoint becomes one file for llama.cpp."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.gguf.file_types import FILE_TYPES, FileTypeName, TypeName
from phiconv.stages.stage import (
    GGUF,
    JSON,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig
    from phiconv.gguf.plan import TensorPlan
    from phiconv.gguf.tensor_types import TypeChoice

# Interpreter, numba and gguf, the vocabulary, and the buffers of a few threads.
_RAM_BYTES = 600 << 20


class TensorOverride(BaseModel):
    """The type of the tensors whose name matches a pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: str = Field(
        description="Pattern (shell style) over the tensor's name in the file, such as "
        "blk.*.ffn_down.weight, or in the checkpoint."
    )
    type: TypeName = Field(description="Its ggml type.")


class ConvertGgufParams(BaseModel):
    """Parameters of `convert-gguf`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_type: FileTypeName = Field(
        description="What llama-quantize calls the file's type; single tensors have the types that "
        "it gives them."
    )
    token_embedding_type: TypeName | None = Field(
        None, description="Type of the token embedding; by default as llama-quantize chooses."
    )
    output_type: TypeName | None = Field(
        None, description="Type of the language-model head; by default as llama-quantize chooses."
    )
    overrides: tuple[TensorOverride, ...] = Field(
        (), description="Types by name pattern; the first match wins. The two above go before it."
    )
    file_name: str = Field(
        "model.gguf",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.gguf$",
        description="Name of the file.",
    )
    name: str | None = Field(
        None,
        min_length=1,
        description="general.name; by default what config.json says, else Phi3. llama.cpp reads "
        "text as Phi-3 does only if it holds phi-3 or phi3.",
    )
    license: str | None = Field(
        None,
        description="general.license, such as mit; by default what the checkpoint's licence file "
        "says.",
    )
    base_model: str | None = Field(
        None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Hub id of the model that this one was made from, for general.base_model.",
    )


class ConvertGguf:
    """Quantizes while it reads and writes one file: no intermediate file, no model in memory."""

    name: ClassVar[str] = "convert-gguf"
    version: ClassVar[int] = 1
    params: ClassVar[type[ConvertGgufParams]] = ConvertGgufParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = GGUF

    def tools(self) -> tuple[str, ...]:
        return ("gguf", "jinja2", "tokenizers")

    def check(self, params: ConvertGgufParams, config: ModelConfig) -> list[PhiconvError]:
        errors: list[PhiconvError] = []
        if config.num_attention_heads * config.head_dim != config.hidden_size:
            errors.append(
                RecipeError(
                    f"{config.num_attention_heads} heads of {config.head_dim} are not "
                    f"{config.hidden_size} wide, as llama.cpp wants them for Phi-3",
                    where=self.name,
                    remedy="llama.cpp cannot run this model",
                )
            )
        if config.hidden_act not in ("silu", "swish"):
            errors.append(
                RecipeError(
                    f"llama.cpp's Phi-3 has the activation silu, this model has "
                    f"{config.hidden_act}",
                    where=self.name,
                    remedy="llama.cpp cannot run this model",
                )
            )
        return errors

    def key_params(self, params: ConvertGgufParams) -> dict[str, JSON]:
        document: dict[str, JSON] = params.model_dump(mode="json")
        return document

    def requires(self, params: ConvertGgufParams) -> tuple[Requirement, ...]:
        return (Requirement("module", "gguf", remedy="pip install gguf"),)

    def estimate(
        self, params: ConvertGgufParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """Bytes of the weights by the type that most of them have."""
        from math import prod

        bits = FILE_TYPES[params.file_type].bits
        weights = sum(prod(shape) for shape in config.expected_tensors().values())
        return Estimate(disk_bytes=int(weights * bits / 8), ram_bytes=_RAM_BYTES)

    def run(self, params: ConvertGgufParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.gguf.metadata import Naming, gguf_metadata
        from phiconv.gguf.plan import plan_tensors
        from phiconv.gguf.special_tokens import read_special_tokens
        from phiconv.gguf.tokenizer_file import read_tokenizer_file
        from phiconv.gguf.vocabulary import read_vocabulary
        from phiconv.gguf.writer import write_gguf

        tokenizer = read_tokenizer_file(ctx.checkpoint.path)
        vocabulary = read_vocabulary(tokenizer, ctx.checkpoint.config.vocab_size)
        unused = {override.match for override in params.overrides}
        plan = plan_tensors(ctx.checkpoint, _choice(params, unused))
        if unused:
            raise StageError(
                f"no tensor matches the override {', '.join(sorted(unused))}",
                where=f"{self.name}: overrides",
                remedy="tensors are named like blk.0.ffn_down.weight",
            )
        metadata = gguf_metadata(
            ctx.checkpoint,
            Naming(params.name, params.license, params.base_model),
            vocabulary,
            read_special_tokens(ctx.checkpoint, tokenizer),
            file_type=params.file_type,
            parameters=plan.parameters,
        )
        limits = (*vocabulary.limits, *_attention_limits(ctx.checkpoint.config))
        for line in (*plan.fallbacks, *limits):
            ctx.progress.note(line)
        written = write_gguf(
            ctx.out / params.file_name,
            metadata,
            plan,
            ctx.checkpoint,
            threads=ctx.threads,
            progress=ctx.progress,
        )
        ctx.record_digest(params.file_name, written.sha256)
        return {
            "file": params.file_name,
            "bytes": written.size,
            "source_bytes": written.source_bytes,
            "tensors": len(plan.tensors),
            "fallbacks": "; ".join(plan.fallbacks) or "none",
            "limits": "; ".join(limits) or "none",
            "tensor_kinds": _tensor_kinds(plan),
        }


def _choice(params: ConvertGgufParams, unused: set[str]) -> TypeChoice:
    """The recipe's wishes; takes from `unused` the patterns that are asked for and match."""
    from phiconv.gguf.tensor_types import TypeChoice

    def override(name: str) -> TypeName | None:
        for entry in params.overrides:
            if fnmatchcase(name, entry.match):
                unused.discard(entry.match)
                return entry.type
        return None

    return TypeChoice(
        file_type=params.file_type,
        token_embedding=params.token_embedding_type,
        output=params.output_type,
        override=override,
    )


def _attention_limits(config: ModelConfig) -> tuple[str, ...]:
    """What llama.cpp does otherwise beyond a sliding window."""
    window = config.sliding_window
    if window is None or window >= config.max_position_embeddings:
        return ()
    return (f"llama.cpp attends to every position, the model to the last {window}",)


_KINDS = {"attn": "attention", "ffn": "mlp", "token_embd": "embedding", "output": "lm_head"}


def _tensor_kinds(plan: TensorPlan) -> list[dict[str, JSON]]:
    """How each kind of weights is stored, for the report."""
    sums: dict[tuple[str, str], list[int]] = {}
    for weight in plan.weights:
        stem = weight.name.split(".")[-2]
        is_norm = stem.endswith("norm")
        kind = "norm" if is_norm else _KINDS.get(stem, _KINDS.get(stem.split("_")[0], "other"))
        total = sums.setdefault((kind, weight.type), [0, 0])
        total[0] += weight.shape[0] * weight.shape[1]
        total[1] += weight.nbytes
    return [
        {"kind": kind, "format": stored, "parameters": parameters, "size_bytes": size}
        for (kind, stored), (parameters, size) in sorted(
            sums.items(), key=lambda item: (-item[1][1], item[0])
        )
    ]
