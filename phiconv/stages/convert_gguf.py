"""Stage `convert-gguf`: a checkpoint becomes one file for llama.cpp."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.gguf.file_types import FILE_TYPES, FileTypeName, TypeName
from phiconv.stages.imatrix import IMATRIX_FILE, Imatrix, ImatrixParams
from phiconv.stages.stage import (
    GGUF,
    IMATRIX,
    JSON,
    OVERLAY,
    Estimate,
    InputRef,
    Prerequisite,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.checkpoint.weight_source import WeightSource
    from phiconv.gguf.importance import ImportanceMatrix
    from phiconv.gguf.plan import TensorPlan
    from phiconv.gguf.tensor_types import TypeChoice
    from phiconv.report.results import TensorKindRecord

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


class ImportanceParams(BaseModel):
    """Where the importance matrix comes from: a file, or calibration texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str | None = Field(
        None,
        min_length=1,
        description="A file of llama-imatrix (GGUF), relative to the recipe's folder; without it "
        "the matrix is computed by the stage imatrix.",
    )
    tokens: str = Field("default", min_length=1, description="As in the stage imatrix.")
    windows: int = Field(64, ge=1, description="As in the stage imatrix.")
    window_length: int = Field(512, ge=2, description="As in the stage imatrix.")
    reference_device: Literal["cpu", "cuda"] = Field("cpu", description="As in the stage imatrix.")

    @field_validator("file", "tokens")
    @classmethod
    def _beside_the_recipe(cls, value: str | None, info: ValidationInfo) -> str | None:
        folder = (info.context or {}).get("folder")
        default = value is None or (info.field_name == "tokens" and value == "default")
        return value if default or folder is None else str(Path(folder) / str(value))

    @model_validator(mode="after")
    def _one_of_both(self) -> ImportanceParams:
        others = self.model_fields_set - {"file"}
        if self.file is not None and others:
            raise ValueError(f"a file needs no {', '.join(sorted(others))}")
        return self


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
    importance: ImportanceParams | None = Field(
        None,
        description="Weigh the error of each column by how strongly it is used; by default all "
        "columns count by their size alone. Q8_0 and floats have no use for it.",
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
    """Quantizes while it reads and writes one file: no intermediate file, no model in memory.

    With an overlay the weights are read through it, without its clip limits and codes, which are
    for MatMulNBits' grids; the importance matrix is made that of the scaled inputs.
    """

    name: ClassVar[str] = "convert-gguf"
    version: ClassVar[int] = 1
    params: ClassVar[type[ConvertGgufParams]] = ConvertGgufParams
    accepts: ClassVar[tuple[str, ...]] = ()
    accepts_also: ClassVar[tuple[str, ...]] = (OVERLAY,)
    produces: ClassVar[str] = GGUF

    def tools(self) -> tuple[str, ...]:
        return ("gguf", "jinja2", "tokenizers")

    def check(self, params: ConvertGgufParams, config: ModelConfig) -> list[PhiconvError]:
        errors: list[PhiconvError] = []
        importance = params.importance
        if importance is not None and importance.file is not None:
            if not Path(importance.file).is_file():
                where = f"{self.name}: importance.file"
                errors.append(RecipeError(f"there is no file {importance.file}", where=where))
        elif importance is not None:
            errors += Imatrix().check(_computed(importance), config)
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
        document: dict[str, JSON] = params.model_dump(mode="json", exclude={"importance"})
        if params.importance is not None and params.importance.file is not None:
            document["importance"] = _digest(params.importance.file)
        # computed, its own step's key says what it is
        return document

    def prerequisites(self, params: ConvertGgufParams) -> tuple[Prerequisite, ...]:
        """The importance matrix, where it is to be computed."""
        if params.importance is None or params.importance.file is not None:
            return ()
        shared = params.importance.model_dump(mode="json", exclude={"file"})
        return (Prerequisite("imatrix", "imatrix", shared),)

    def requires(self, params: ConvertGgufParams) -> tuple[Requirement, ...]:
        return (Requirement("module", "gguf", remedy="pip install gguf"),)

    def preload(self) -> None:
        """Imports gguf, jinja2, the tokenizers and the kernels."""
        import jinja2.sandbox  # noqa: F401
        import tokenizers  # noqa: F401

        import phiconv.gguf.key_values
        import phiconv.gguf.writer  # noqa: F401
        from phiconv.kernels.floats import load_cast

        load_cast()  # norms are in every file

    def estimate(
        self, params: ConvertGgufParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """Bytes of the weights by the type that most of them have."""
        bits = FILE_TYPES[params.file_type].bits
        weights = sum(prod(shape) for shape in config.expected_tensors().values())
        return Estimate(disk_bytes=int(weights * bits / 8), ram_bytes=_RAM_BYTES)

    def run(self, params: ConvertGgufParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.gguf.metadata import Naming, gguf_metadata
        from phiconv.gguf.special_tokens import read_special_tokens
        from phiconv.gguf.tokenizer_file import read_tokenizer_file
        from phiconv.gguf.vocabulary import read_vocabulary
        from phiconv.gguf.writer import write_gguf
        from phiconv.stages.overlaid import weight_source

        source = weight_source(ctx)
        tokenizer = read_tokenizer_file(ctx.checkpoint.path)
        vocabulary = read_vocabulary(tokenizer, ctx.checkpoint.config.vocab_size)
        importance = _importance(params, ctx)
        plan = _plan(params, ctx.checkpoint)
        metadata = gguf_metadata(
            ctx.checkpoint,
            Naming(params.name, params.license, params.base_model),
            vocabulary,
            read_special_tokens(ctx.checkpoint, tokenizer),
            file_type=params.file_type,
            parameters=plan.parameters,
            importance=importance,
        )
        limits = (*vocabulary.limits, *_attention_limits(ctx.checkpoint.config))
        for line in (*plan.fallbacks, *limits, *_unused_of_overlay(source)):
            ctx.progress.note(line)
        written = write_gguf(
            ctx.out / params.file_name,
            metadata,
            plan,
            source,
            importance=_fitting(importance, plan, source) if importance is not None else None,
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
            "tensor_kinds": [asdict(record) for record in _tensor_kinds(plan)],
        }


def _plan(params: ConvertGgufParams, checkpoint: Checkpoint) -> TensorPlan:
    """The tensors and their types.

    Raises:
        StageError: An override is for no tensor.
    """
    from phiconv.gguf.plan import plan_tensors

    unused = {override.match for override in params.overrides}
    plan = plan_tensors(checkpoint, _choice(params, unused))
    if unused:
        raise StageError(
            f"no tensor matches the override {', '.join(sorted(unused))}",
            where=f"{ConvertGguf.name}: overrides",
            remedy="tensors are named like blk.0.ffn_down.weight",
        )
    return plan


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
        has_importance=params.importance is not None,
    )


def _computed(importance: ImportanceParams) -> ImatrixParams:
    """The parameters of the stage that computes it."""
    return ImatrixParams.model_validate(importance.model_dump(exclude={"file"}))


def _digest(file: str) -> str | None:
    """sha256 of a file; None when it cannot be read, which `check` has said."""
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


def _importance(params: ConvertGgufParams, ctx: StageContext) -> ImportanceMatrix | None:
    from phiconv.gguf.importance import load_importance

    if params.importance is None:
        return None
    if params.importance.file is not None:
        return load_importance(Path(params.importance.file))
    return load_importance(ctx.input(IMATRIX).path / IMATRIX_FILE)


def _fitting(
    matrix: ImportanceMatrix, plan: TensorPlan, source: WeightSource
) -> dict[str, NDArray[np.float32]]:
    """The importance of this model's columns.

    Where an overlay multiplies a column, it divides what the column is multiplied with: mean
    squares of the inputs are divided by the factors' squares.

    Raises:
        StageError: The matrix is another model's.
    """
    import numpy as np

    from phiconv.checkpoint.overlaid import OverlaidCheckpoint

    means = matrix.means()
    columns = {weight.name: weight.shape[1] for weight in plan.weights}
    wrong = [name for name, mean in means.items() if columns.get(name) != len(mean)]
    lacking = [
        weight.name
        for weight in plan.weights
        if weight.name.startswith("blk.") and not weight.is_vector and weight.name not in means
    ]
    if wrong or lacking:
        name = (wrong or lacking)[0]
        what = f"its {name} does not fit" if wrong else f"it has no {name}"
        raise StageError(
            f"the importance matrix is not this model's: {what}",
            where="convert-gguf: importance",
            remedy="compute it from this model, or leave file out",
        )
    factors = source.overlay.columns if isinstance(source, OverlaidCheckpoint) else {}
    for weight in plan.weights:
        if weight.source in factors and weight.name in means:
            np.divide(means[weight.name], np.square(factors[weight.source]), out=means[weight.name])
    return means


def _unused_of_overlay(source: WeightSource) -> tuple[str, ...]:
    """What an overlay holds for MatMulNBits alone."""
    from phiconv.checkpoint.overlaid import OverlaidCheckpoint

    if not isinstance(source, OverlaidCheckpoint) or not source.overlay.needs_grid:
        return ()
    return ("the overlay's clip limits and codes are for other formats and not used",)


def _attention_limits(config: ModelConfig) -> tuple[str, ...]:
    """What llama.cpp does otherwise beyond a sliding window."""
    window = config.sliding_window
    if window is None or window >= config.max_position_embeddings:
        return ()
    return (f"llama.cpp attends to every position, the model to the last {window}",)


def _tensor_kinds(plan: TensorPlan) -> tuple[TensorKindRecord, ...]:
    """How each kind of weights is stored, for the report."""
    from phiconv.gguf.contents import StoredTensor, tensor_kinds

    return tensor_kinds(
        StoredTensor(weight.name, weight.type, prod(weight.shape), weight.nbytes)
        for weight in plan.weights
    )
