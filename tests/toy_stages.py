"""Small real stages for the engine's tests: they read the checkpoint and write files."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

from phiconv import machine
from phiconv.batch import Outcome, build_all, make_plans
from phiconv.errors import PhiconvError, StageError
from phiconv.plan import Plan
from phiconv.progress import PlainDisplay, QuietDisplay
from phiconv.recipe import Overrides, Recipe, load
from phiconv.report.document import MEASUREMENT_FILE, measurement_json
from phiconv.report.results import Measurement, Provenance, TokenSetRecord
from phiconv.stages.stage import (
    JSON,
    MEASUREMENT,
    ONNX,
    ONNX_GRAPH,
    Estimate,
    InputRef,
    Prerequisite,
    Requirement,
    Stage,
    StageContext,
)
from phiconv.workspace import Workspace

TOKENS = "tokens"


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


class MeasureParams(BaseModel):
    """Parameters of `measure`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: str = Field("CPUExecutionProvider", description="Where it runs.")
    gates: dict[str, dict[Literal["min", "max"], float]] = Field(
        default_factory=dict, description="Limits by metric."
    )

    def limits(self) -> dict[str, dict[Literal["min", "max"], float]]:
        return self.gates


class Measure:
    """Measures the share of zero bits in the artifact's files."""

    name: ClassVar[str] = "measure"
    version: ClassVar[int] = 1
    params: ClassVar[type[BaseModel]] = MeasureParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX,)
    produces: ClassVar[str] = MEASUREMENT

    def __init__(self) -> None:
        self.runs = 0

    def tools(self) -> tuple[str, ...]:
        return ()

    def check(self, params: MeasureParams, config: Any) -> list[PhiconvError]:
        return []

    def key_params(self, params: MeasureParams) -> dict[str, JSON]:
        return {"provider": params.provider}

    def requires(self, params: MeasureParams) -> tuple[Requirement, ...]:
        return (Requirement("provider", params.provider, optional=True),)

    def prerequisites(self, params: MeasureParams) -> tuple[Prerequisite, ...]:
        return (Prerequisite("tokens", "tokens", {"count": 4}),)

    def run(self, params: MeasureParams, ctx: StageContext) -> dict[str, JSON]:
        self.runs += 1
        assert ctx.input(TOKENS).path.joinpath("tokens.json").is_file()
        data = b"".join(path.read_bytes() for path in sorted(ctx.input(ONNX).path.rglob("*.bin")))
        ones = sum(byte.bit_count() for byte in data)
        here = params.provider in machine.providers()
        measurement = Measurement(
            status="measured" if here else "not_run",
            tokens=TokenSetRecord("toy", 1, 4, "sha256:0", "sha256:1"),
            provenance=Provenance("toy", "1", params.provider, params.provider if here else None),
            metrics={"top1_agreement": ones / (8 * len(data))} if here else {},
        )
        (ctx.out / MEASUREMENT_FILE).write_text(measurement_json(measurement), encoding="utf-8")
        return {"bits": 8 * len(data)}


class TokensParams(BaseModel):
    """Parameters of `tokens`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(description="How many.")


class Tokens:
    """Writes a list of numbers; a prerequisite of `measure`."""

    name: ClassVar[str] = "tokens"
    version: ClassVar[int] = 1
    params: ClassVar[type[BaseModel]] = TokensParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = TOKENS

    def tools(self) -> tuple[str, ...]:
        return ("tokenizers",)

    def check(self, params: TokensParams, config: Any) -> list[PhiconvError]:
        return []

    def key_params(self, params: TokensParams) -> dict[str, JSON]:
        return {"count": params.count}

    def requires(self, params: TokensParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: TokensParams, ctx: StageContext) -> dict[str, JSON]:
        text = json.dumps(list(range(params.count)))
        (ctx.out / "tokens.json").write_text(text, encoding="utf-8")
        return {}


def registry(**replaced: Stage) -> Mapping[str, Stage]:
    """The toy stages by name; keyword arguments replace them (`write_onnx=WriteOnnx(...)`)."""
    stages: dict[str, Stage] = {
        "export-onnx": Export(),
        "quantize": Quantize(),
        "write-onnx": WriteOnnx(),
        "stamp": Stamp(),
        "measure": Measure(),
        "tokens": Tokens(),
    }
    return stages | {name.replace("_", "-"): stage for name, stage in replaced.items()}


RECIPE = """\
schema: 1
name: toy
model: {source: model}
stages:
  - {id: onnx, uses: export-onnx}
  - {id: int4, uses: quantize, with: {block_size: 64}}
  - {id: check, uses: measure, with: {gates: {top1_agreement: {min: 0.1}}}}
"""


class Bench:
    """A folder with a workspace, a checkpoint and recipes; builds and plans them."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.workspace = Workspace(folder / "home")
        self.out = folder / "out"
        self.shown = io.StringIO()

    def recipe(self, text: str = RECIPE, name: str = "toy.yaml") -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, text: str, stages: Mapping[str, Stage], *settings: str) -> Recipe:
        overrides = Overrides(model=str(self.checkpoint), settings=settings)
        return load(self.recipe(text), overrides, stages)

    def plan(
        self, text: str = RECIPE, stages: Mapping[str, Stage] | None = None, *settings: str
    ) -> Plan:
        stages = stages or registry()
        recipe = self.load(text, stages, *settings)
        return make_plans([recipe], self.workspace, QuietDisplay(), stages)[0]

    def build(
        self,
        text: str = RECIPE,
        stages: Mapping[str, Stage] | None = None,
        *settings: str,
        rebuild: bool = False,
        threads: int = 1,
    ) -> Outcome:
        stages = stages or registry()
        [outcome] = build_all(
            [self.load(text, stages, *settings)],
            self.workspace,
            PlainDisplay(self.shown),
            stages,
            out=self.out,
            threads=threads,
            rebuild=rebuild,
        )
        return outcome

    def states(self, outcome: Outcome) -> dict[str, bool]:
        """Whether each step of a build was cached."""
        assert outcome.built is not None, outcome.error
        return {stage.id: stage.cached for stage in outcome.built.result.stages}


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_whole(out: Path) -> None:
    """Asserts that what stands in an output folder is whole, if anything stands there."""
    manifest = out / "manifest.json"
    if not manifest.exists():
        return
    document = json.loads(manifest.read_text(encoding="utf-8"))
    found = files_in(out / "artifact")
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == {
        name: entry["sha256"] for name, entry in document["artifact"].items()
    }
    assert sorted(files_in(out / "report")) == sorted(document["report"])
