"""The stage olive, with the real package, on artifacts of the trained example checkpoint."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import log_softmax

from phiconv import machine
from phiconv.cache_key import is_present
from phiconv.errors import EnvironmentLacksError, RecipeError, StageError
from phiconv.onnx.folder import open_folder
from phiconv.onnx.olive_pass import listed_passes
from phiconv.onnx.quantize import Target, quantize_graph
from phiconv.stages.olive import Olive, OliveParams
from phiconv.stages.stage import ONNX, Artifact, Requirement, StageContext
from tests.onnx.models import hugging_face_logits, lay_out, onnx_logits, open_checkpoint, write
from tests.terminal import Terminal

TINY = Path(__file__).parents[2] / "examples" / "tiny-phi3"
INT4 = Target(bits=4, block_size=32, symmetric=True, search="none", accuracy_level=0)
IDS = np.arange(64, dtype=np.int64) * 37 % 3000

needs_olive = pytest.mark.skipif(
    importlib.util.find_spec("olive") is None, reason="olive-ai is not installed"
)


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-phi3 for DirectML: fp16 activations and logits, int4 weights."""
    folder = tmp_path_factory.mktemp("olive")
    graph = lay_out(TINY, folder, "dml", "fp16")
    quantize_graph(graph, lambda weight: INT4 if weight.role == "body" else None)
    write(graph, TINY, folder / "artifact")
    assert graph.genai is not None
    shutil.copytree(graph.genai, folder / "artifact", dirs_exist_ok=True)
    return folder / "artifact"


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-phi3 as it is."""
    folder = tmp_path_factory.mktemp("olive-fp32")
    graph = lay_out(TINY, folder)
    write(graph, TINY, folder / "artifact")
    return folder / "artifact"


def run(artifact: Path, out: Path, name: str, **params: Any) -> Path:
    out.mkdir()
    context = StageContext(out, [Artifact("in", ONNX, "", artifact)], open_checkpoint(TINY))
    facts = Olive().run(OliveParams.model_validate({"pass": name, **params}), context)
    assert facts["pass"] == name
    return out


def surgeries(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"surgeries": list(entries)}


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL divergence over positions, in nats."""
    p, q = (log_softmax(x.astype(np.float64), axis=-1) for x in (reference, logits))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@needs_olive
def test_io_types_become_fp32_and_the_logits_stay(fp16: Path, tmp_path: Path) -> None:
    out = run(
        fp16, tmp_path / "out", "OnnxIODataTypeConverter", config={"name_pattern": "^logits$"}
    )
    import onnx

    model = onnx.load(out / "model.onnx", load_external_data=False)
    (logits,) = [value for value in model.graph.output if value.name == "logits"]
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    # the CPU's kernels compute the head in fp32 and round its result only for an fp16 output
    rounded = onnx_logits(out, IDS).astype(np.float16)
    assert np.array_equal(rounded, onnx_logits(fp16, IDS).astype(np.float16))


@needs_olive
def test_a_surgery_replaces_the_norms_and_keeps_the_function(fp32: Path, tmp_path: Path) -> None:
    out = run(
        fp32,
        tmp_path / "out",
        "GraphSurgeries",
        config=surgeries({"surgeon": "SimplifiedLayerNormToL2Norm"}),
    )
    import onnx

    operators = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert "LpNormalization" in operators
    assert not {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"} & operators
    # the surgery leaves the norms' epsilon out, 1e-5 of a mean square
    reference = hugging_face_logits(TINY, IDS)
    assert divergence(reference, onnx_logits(out, IDS)) < 1e-4
    assert np.abs(onnx_logits(fp32, IDS) - reference).max() < 1e-4


@needs_olive
def test_the_optimizer_takes_nodes_out(fp16: Path, tmp_path: Path) -> None:
    out = run(
        fp16,
        tmp_path / "out",
        "OnnxPeepholeOptimizer",
        config={"onnxoptimizer_optimize": False},
        provider="dml",
    )
    import onnx

    nodes = len(onnx.load(out / "model.onnx").graph.node)
    assert nodes < len(onnx.load(fp16 / "model.onnx").graph.node)
    assert np.array_equal(onnx_logits(out, IDS), onnx_logits(fp16, IDS))


@needs_olive
def test_four_bit_constants_are_written_as_stored(tmp_path: Path) -> None:
    """MatMulNBitsToQDQ leaves weights of ONNX's own 4-bit type, two numbers a byte."""
    graph = lay_out(TINY, tmp_path)
    # ONNX Runtime runs such a pair of nodes as MatMulNBits with int8 activations
    target = replace(INT4, accuracy_level=4)
    quantize_graph(graph, lambda weight: None if weight.role == "embedding" else target)
    write(graph, TINY, tmp_path / "int4")
    out = run(tmp_path / "int4", tmp_path / "out", "MatMulNBitsToQDQ")
    difference = onnx_logits(out, IDS) - onnx_logits(tmp_path / "int4", IDS)
    assert np.abs(difference).max() < 1e-3


@needs_olive
def test_the_folder_is_complete_and_phiconvs_own(fp16: Path, tmp_path: Path) -> None:
    """Also where a pass only links the data file to its own, as AddOliveMetadata does."""
    out = run(fp16, tmp_path / "out", "AddOliveMetadata", config={"graph_name": "phi"})
    opened = open_folder(out)
    assert opened.model.name == "model.onnx"
    assert sorted(file.name for file in out.iterdir()) == sorted(
        file.name for file in fp16.iterdir()
    )
    assert set(opened.files) >= {"model.onnx.data", "genai_config.json", "tokenizer.json"}
    assert (out / "model.onnx.data").stat().st_nlink == 1
    assert (fp16 / "model.onnx.data").stat().st_nlink == 1
    again = run(fp16, tmp_path / "again", "AddOliveMetadata", config={"graph_name": "phi"})
    for name in ("model.onnx", "model.onnx.data"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


@needs_olive
@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("OnnxIODataTypeConverter", {"name_pattern": "^absent$"}, "left the model as it is"),
        ("OnnxIODataTypeConverter", {"target_type": 1}, "no config key target_type"),
        ("OnnxIODataTypeConverter", {"target_dtype": "float"}, "ValidationError"),
        ("GraphSurgeries", surgeries({"surgeon": "TieWordEmbeddings"}), "left the model as it is"),
        ("GraphSurgeries", surgeries({"surgeon": "ShareEmbeddingLmHead"}), "skipping"),
        ("GraphSurgeries", surgeries({"surgeon": "DeduplicateNodes", "x": 1}), "extra parameters"),
        ("GraphSurgeries", surgeries({"surgeon": "NoSuchSurgeon"}), "does not exist"),
        (
            "GraphSurgeries",
            surgeries({"surgeon": "RenameOutputs", "old_names": ["logits"], "new_names": ["out"]}),
            "lacks an output logits",
        ),
        ("SplitModel", {}, "No split assignments"),
    ],
)
def test_what_olive_would_go_on_after_fails_the_stage(
    fp16: Path, tmp_path: Path, name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError, match=message) as raised:
        run(fp16, tmp_path / "out", name, config=config)
    assert raised.value.remedy


@needs_olive
def test_a_warning_can_be_accepted(fp16: Path, tmp_path: Path) -> None:
    params: dict[str, Any] = {"name": "OnnxPeepholeOptimizer"}
    with pytest.raises(StageError, match="install `onnxoptimizer`"):
        run(fp16, tmp_path / "refused", **params)
    out = run(fp16, tmp_path / "out", accept_warnings=["Please install `onnxoptimizer`*"], **params)
    assert np.array_equal(onnx_logits(out, IDS), onnx_logits(fp16, IDS))


@needs_olive
def test_wishes_that_cannot_be_met_are_found_at_plan_time() -> None:
    config = open_checkpoint(TINY).config

    def errors(name: str, **params: Any) -> str:
        found = Olive().check(OliveParams.model_validate({"pass": name, **params}), config)
        assert all(isinstance(error, RecipeError | EnvironmentLacksError) for error in found)
        return "\n".join(map(str, found))

    assert errors("GraphSurgeries", config=surgeries()) == ""
    assert "did you mean 'GraphSurgeries'" in errors("GraphSurgery")
    assert "known: AddOliveMetadata" in errors("xxxx")
    assert "does not work on ONNX models" in errors("GptqQuantizer")
    assert "wants a data set" in errors("OnnxStaticQuantization")
    assert "needs " in errors("OnnxBnb4Quantization")
    assert "config.external_data_name" in errors(
        "GraphSurgeries", config={"external_data_name": "../x"}
    )


@needs_olive
def test_the_list_of_passes_is_the_packages_own() -> None:
    from olive.package_config import OlivePackageConfig

    known = OlivePackageConfig.load_default_config().passes
    assert {name.lower() for name in listed_passes()} == set(known)


def test_parameters_are_validated() -> None:
    with pytest.raises(ValidationError):
        OliveParams.model_validate({"config": {}})
    with pytest.raises(ValidationError):
        OliveParams.model_validate({"pass": "GraphSurgeries", "option": 1})
    key = Olive().key_params(OliveParams.model_validate({"pass": "P", "config": {"a": [1]}}))
    assert json.dumps(key) and key["pass"] == "P"
    assert "olive-ai" in Olive().tools()


def test_without_olive_the_plan_says_so_and_the_build_ends_with_5(
    phiconv: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nname: io\nmodel: {source: x}\nstages:\n"
        "  - {id: onnx, uses: export-onnx}\n"
        "  - {id: io, uses: olive, with: {pass: OnnxIODataTypeConverter}}\n"
    )
    found = importlib.util.find_spec

    def absent(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name == "olive" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    (requirement,) = Olive().requires(OliveParams.model_validate({"pass": "GraphSurgeries"}))
    assert requirement == Requirement("module", "olive", remedy='pip install "phiconv[olive]"')
    assert not is_present(requirement) and not machine.has_module("olive")
    planned = phiconv("plan", str(recipe), "--model", str(TINY))
    assert planned.code == 0 and "olive" in planned.out
    built = phiconv("build", str(recipe), "--model", str(TINY), "--out", str(tmp_path / "out"))
    assert built.code == 5
    assert 'pip install "phiconv[olive]"' in built.err


@needs_olive
def test_a_recipe_runs_a_pass_and_validates_the_result(phiconv: Terminal, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nname: io\nmodel: {source: x}\nstages:\n"
        "  - {id: onnx, uses: export-onnx, with: {provider: dml}}\n"
        "  - {id: int8, uses: quantize, with: {bits: 8}}\n"
        "  - id: io\n    uses: olive\n"
        "    with: {pass: OnnxIODataTypeConverter, config: {name_pattern: logits}, provider: dml}\n"
        "  - id: check\n    uses: validate\n"
        "    with: {windows: 2, window_length: 64, layer_errors: false,"
        " gates: {kl_divergence.mean: {max: 0.001}}}\n"
    )
    out = tmp_path / "out"
    built = phiconv("build", str(recipe), "--model", str(TINY), "--out", str(out))
    assert built.code == 0, built.err
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["status"] == "passed"
    (verdict,) = report["verdicts"]
    assert verdict["stage"] == "check"
    # planning again is a hit throughout: the key holds all that the pass depends on
    again = json.loads(phiconv("plan", str(recipe), "--model", str(TINY), "--json").out)
    plans = again if isinstance(again, list) else [again]
    (step,) = [step for step in plans[0]["steps"] if step["id"] == "io"]
    assert step["state"] == "hit"
    assert step["key_of"]["tools"]["olive-ai"] == machine.version("olive-ai")
