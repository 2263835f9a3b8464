"""Small real stages for the engine's tests: they read the checkpoint and write files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from phiconv.errors import PhiconvError, StageError
from phiconv.stages.stage import (
    JSON,
    ONNX,
    ONNX_GRAPH,
    Estimate,
    InputRef,
    Requirement,
    Stage,
    StageContext,
)


class ExportParams(BaseModel):
    """Parameters of `export-onnx`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Literal["cpu", "cuda", "dml"] = Field("cpu", description="Target provider.")
    precision: Literal["fp16", "fp32"] = Field("fp32", description="Float type.")


class Export:
    """Writes the config's numbers as a graph."""

    name: ClassVar[str] = "export-onnx"
    version: ClassVar[int] = 1
    params: ClassVar[type[BaseModel]] = ExportParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = ONNX_GRAPH

    def tools(self) -> tuple[str, ...]:
        return ("onnx",)

    def check(self, params: ExportParams, config: Any) -> list[PhiconvError]:
        return []

    def key_params(self, params: ExportParams) -> dict[str, JSON]:
        return params.model_dump(mode="json")

    def requires(self, params: ExportParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: ExportParams, ctx: StageContext) -> dict[str, JSON]:
        text = json.dumps([params.provider, params.precision, ctx.checkpoint.digest])
        (ctx.out / "graph.txt").write_text(text, encoding="utf-8")
        return {"nodes": 3}


class Override(BaseModel):
    """What one pattern changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = Field(8, ge=2, le=8, description="Bits a weight.")


class QuantizeParams(BaseModel):
    """Parameters of `quantize`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[4, 8] = Field(4, description="Bits a weight.")
    block_size: int = Field(32, ge=16, le=256, description="Weights that share a scale.")
    symmetric: bool = Field(True, description="No zero points.")
    overrides: dict[str, Override] = Field(default_factory=dict, description="By pattern.")


class Quantize:
    """Rewrites the graph."""

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1
    params: ClassVar[type[BaseModel]] = QuantizeParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    produces: ClassVar[str] = ONNX_GRAPH

    def tools(self) -> tuple[str, ...]:
        return ()

    def check(self, params: QuantizeParams, config: Any) -> list[PhiconvError]:
        if config.hidden_size % params.block_size:
            return [StageError(f"block_size {params.block_size} does not divide the width")]
        return []

    def key_params(self, params: QuantizeParams) -> dict[str, JSON]:
        return params.model_dump(mode="json")

    def requires(self, params: QuantizeParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: QuantizeParams, ctx: StageContext) -> dict[str, JSON]:
        graph = (ctx.input(ONNX_GRAPH).path / "graph.txt").read_text(encoding="utf-8")
        text = f"{graph}\n{params.model_dump_json()}"
        (ctx.out / "graph.txt").write_text(text, encoding="utf-8")
        return {}


class WriteParams(BaseModel):
    """Parameters of `write-onnx`: none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WriteOnnx:
    """Writes `parts` files in several steps, one of them large, the last one describing them."""

    name: ClassVar[str] = "write-onnx"
    version: ClassVar[int] = 1
    params: ClassVar[type[BaseModel]] = WriteParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    produces: ClassVar[str] = ONNX

    def __init__(self, *, parts: int = 3, part_bytes: int = 1 << 10, pause: float = 0.0) -> None:
        self.parts, self.part_bytes, self.pause = parts, part_bytes, pause

    def tools(self) -> tuple[str, ...]:
        return ()

    def check(self, params: WriteParams, config: Any) -> list[PhiconvError]:
        return []

    def key_params(self, params: WriteParams) -> dict[str, JSON]:
        return {"parts": self.parts, "part_bytes": self.part_bytes}

    def requires(self, params: WriteParams) -> tuple[Requirement, ...]:
        return ()

    def estimate(self, params: WriteParams, config: Any, inputs: list[InputRef]) -> Estimate:
        return Estimate(disk_bytes=self.parts * self.part_bytes, ram_bytes=self.part_bytes)

    def run(self, params: WriteParams, ctx: StageContext) -> dict[str, JSON]:
        graph = (ctx.input(ONNX_GRAPH).path / "graph.txt").read_bytes()
        ctx.progress.start(self.parts * self.part_bytes)
        index: dict[str, str] = {}
        (ctx.out / "weights").mkdir()
        for part in range(self.parts):
            name = f"weights/part-{part}.bin"
            index[name] = self._write_part(ctx, ctx.out / name, hashlib.sha256(graph), part)
            ctx.record_digest(name, index[name])
        (ctx.out / "model.json").write_text(json.dumps(index), encoding="utf-8")
        return {"parts": self.parts}

    def _write_part(self, ctx: StageContext, path: Path, seed: Any, part: int) -> str:
        seed.update(bytes([part]))
        piece = (seed.digest() * (self.part_bytes // 128 + 1))[: self.part_bytes // 4]
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for _ in range(4):
                file.write(piece)
                digest.update(piece)
                ctx.progress.advance(len(piece), path.name)
                time.sleep(self.pause)
        return digest.hexdigest()


def _beside_recipe(value: Path, info: ValidationInfo) -> Path:
    return Path(info.context["folder"]) / value if info.context else value


class StampParams(BaseModel):
    """Parameters of `stamp`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[Path, AfterValidator(_beside_recipe)] = Field(description="Text to add.")
    provider: str = Field("CPUExecutionProvider", description="Needed provider.")
    optional: bool = Field(False, description="Whether it goes on without.")


class Stamp:
    """Adds a text file to a graph; runs `action` first, which may fail as the test wants."""

    name: ClassVar[str] = "stamp"
    version: ClassVar[int] = 1
    params: ClassVar[type[BaseModel]] = StampParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    produces: ClassVar[str] = ONNX_GRAPH

    def __init__(self, action: Callable[[StageContext], None] = lambda ctx: None) -> None:
        self.action = action

    def tools(self) -> tuple[str, ...]:
        return ()

    def check(self, params: StampParams, config: Any) -> list[PhiconvError]:
        return []

    def key_params(self, params: StampParams) -> dict[str, JSON]:
        return {"sha256": hashlib.sha256(params.file.read_bytes()).hexdigest()}

    def requires(self, params: StampParams) -> tuple[Requirement, ...]:
        return (Requirement("provider", params.provider, params.optional, "buy one"),)

    def run(self, params: StampParams, ctx: StageContext) -> dict[str, JSON]:
        graph = (ctx.input(ONNX_GRAPH).path / "graph.txt").read_text(encoding="utf-8")
        text = graph + params.file.read_text(encoding="utf-8")
        (ctx.out / "graph.txt").write_text(text, encoding="utf-8")
        self.action(ctx)
        return {}


def registry(**replaced: Stage) -> Mapping[str, Stage]:
    """The toy stages by name; keyword arguments replace them (`write_onnx=WriteOnnx(...)`)."""
    stages: dict[str, Stage] = {
        "export-onnx": Export(),
        "quantize": Quantize(),
        "write-onnx": WriteOnnx(),
        "stamp": Stamp(),
    }
    return stages | {name.replace("_", "-"): stage for name, stage in replaced.items()}


def pid_alive(pid: int) -> bool:
    """Whether a process runs (POSIX)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
