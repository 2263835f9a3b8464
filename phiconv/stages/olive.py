"""Stage `olive`: one pass of Microsoft Olive on an ONNX artifact."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, PhiconvError, RecipeError
from phiconv.stages.stage import JSON, ONNX, Estimate, InputRef, Requirement, StageContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig
    from phiconv.onnx.olive_pass import ListedPass

_REMEDY = 'pip install "phiconv[olive]"'
# Interpreter, torch and Olive; the model is in memory about twice on top.
_RAM_BYTES = 1200 << 20


class OliveParams(BaseModel):
    """Parameters of `olive`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    olive_pass: str = Field(
        alias="pass", description="Name of the pass, such as OnnxIODataTypeConverter."
    )
    config: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="The pass's own configuration. How tensors are stored is phiconv's decision; "
        "files, data sets and user scripts are not taken.",
    )
    provider: Literal["cpu", "cuda", "dml"] = Field(
        "cpu", description="Execution provider that the pass is told to optimize for."
    )
    accept_warnings: tuple[str, ...] = Field(
        (),
        description="Patterns (shell style) of what the pass may warn of; any other warning, and "
        "every error that it logs, fails the stage.",
    )


class Olive:
    """Runs the pass, then writes the model as phiconv writes every model."""

    name: ClassVar[str] = "olive"
    version: ClassVar[int] = 1
    params: ClassVar[type[OliveParams]] = OliveParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX,)
    produces: ClassVar[str] = ONNX

    def tools(self) -> tuple[str, ...]:
        return ("olive-ai", "onnx", "onnx-ir", "onnxruntime", "onnxscript")

    def check(self, params: OliveParams, config: ModelConfig) -> list[PhiconvError]:
        from phiconv.onnx.olive_pass import EXTERNAL_DATA_KEYS, listed_passes

        errors: list[PhiconvError] = [
            RecipeError(
                f"{key} is phiconv's own decision: one file model.onnx.data beside the model",
                where=f"olive: config.{key}",
                remedy="leave it out",
            )
            for key in EXTERNAL_DATA_KEYS
            if key in params.config
        ]
        passes = listed_passes()
        if not passes:
            return errors  # what is missing is named by `requires`
        found = passes.get(params.olive_pass)
        if found is None:
            close = difflib.get_close_matches(params.olive_pass, passes, n=1, cutoff=0.6)
            known = sorted(name for name, entry in passes.items() if entry.takes_onnx)
            remedy = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            errors.append(
                RecipeError(
                    f"Olive has no pass {params.olive_pass!r}", where="olive: pass", remedy=remedy
                )
            )
            return errors
        return errors + _unfit(params.olive_pass, found)

    def key_params(self, params: OliveParams) -> dict[str, JSON]:
        document: dict[str, JSON] = params.model_dump(mode="json", by_alias=True)
        return document

    def requires(self, params: OliveParams) -> tuple[Requirement, ...]:
        return (Requirement("module", "olive", remedy=_REMEDY),)

    def estimate(
        self, params: OliveParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """What the steps before wrote, twice more in scratch space; twice in memory."""
        from phiconv.stages.write_onnx import WriteOnnx, WriteOnnxParams

        size = WriteOnnx().estimate(WriteOnnxParams(), config, inputs).disk_bytes
        return Estimate(disk_bytes=3 * size, ram_bytes=_RAM_BYTES + 2 * size)

    def run(self, params: OliveParams, ctx: StageContext) -> dict[str, JSON]:
        import shutil

        from phiconv.onnx.folder import open_folder
        from phiconv.onnx.graph import DATA_FILE, OnnxGraph
        from phiconv.onnx.olive_pass import run_pass
        from phiconv.onnx.writer import write_model

        before = open_folder(ctx.input(ONNX).path)
        scratch = ctx.out / "olive"
        given, made = scratch / "given", scratch / "made"
        given.mkdir(parents=True)
        made.mkdir()
        # Some passes link files of theirs to the model's, and ONNX reads no file with two names: a
        # kill before the link is gone would leave the artifact unreadable.
        for name in before.files:
            shutil.copyfile(before.path / name, given / name)
        model = run_pass(
            params.olive_pass,
            params.config,
            given / before.model.name,
            made,
            provider=params.provider,
            accept_warnings=params.accept_warnings,
        )
        graph = OnnxGraph(model)
        written = write_model(
            graph, ctx.checkpoint, ctx.out, threads=ctx.threads, progress=ctx.progress
        )
        ctx.record_digest(DATA_FILE, written.data_sha256)
        del model, graph  # they hold files of the scratch folder open
        shutil.rmtree(scratch)
        for name in before.files:
            if name not in (before.model.name, DATA_FILE):
                shutil.copyfile(before.path / name, ctx.out / name)
        open_folder(ctx.out)
        return {
            "pass": params.olive_pass,
            "data_bytes": written.data_bytes,
            "tensors": written.tensors,
        }


def _unfit(name: str, found: ListedPass) -> list[PhiconvError]:
    """Why a pass that Olive has cannot be run here."""
    errors: list[PhiconvError] = []
    if not found.takes_onnx or found.needs_data:
        why = "wants a data set" if found.takes_onnx else "does not work on ONNX models"
        errors.append(
            RecipeError(
                f"the pass {name} {why}", where="olive: pass", remedy="run it with Olive itself"
            )
        )
    absent = [package for package in found.distributions if machine.version(package) is None]
    if absent:
        errors.append(
            EnvironmentLacksError(
                f"the pass {name} needs {', '.join(absent)}",
                where="olive: pass",
                remedy=f"pip install {' '.join(absent)}",
            )
        )
    return errors
