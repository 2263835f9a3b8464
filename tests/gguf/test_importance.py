from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from phiconv.checkpoint import Checkpoint
from phiconv.errors import CheckpointError, PhiconvError, StageError
from phiconv.gguf.importance import ImportanceMatrix, load_importance
from phiconv.plan import Plan, make_plan
from phiconv.recipe.resolve import load
from phiconv.runtimes.activations import LINEAR_LAYERS, square_sums
from phiconv.stages.convert_gguf import ConvertGguf, ConvertGgufParams
from phiconv.stages.imatrix import IMATRIX_FILE, Imatrix, ImatrixParams
from phiconv.stages.stage import Artifact, StageContext
from phiconv.tokens import load_token_set
from phiconv.workspace import Workspace
from tests import llama_cpp_oracle
from tests.gguf.conversions import convert, metadata, tensors
from tests.gguf.peer_cases import importance
from tests.phi3_checkpoints import write_phi3_checkpoint

WINDOWS = np.random.default_rng(0).integers(8, 290, (5, 70))
SHORT = {"windows": 2, "window_length": 48}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("importance") / "model"
    return write_phi3_checkpoint(folder, hidden_size=256, sliding_window=40)


def plan(checkpoint: Path, tmp_path: Path, *settings: dict[str, Any]) -> Plan:
    """A plan of one conversion a settings, none of them validated."""
    stages = [
        {"id": f"gguf{index}", "uses": "convert-gguf", "with": {"file_type": "Q4_0", **given}}
        for index, given in enumerate(settings)
    ]
    recipe = {"schema": 1, "name": "x", "model": {"source": "model"}, "stages": stages}
    file = checkpoint.parent / "x.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return make_plan(load(file), Checkpoint(checkpoint), Workspace(tmp_path / "home"))


def test_sums_are_those_of_the_whole_model(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected: dict[str, np.ndarray] = {}

    def watch(name: str) -> None:
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            total = inputs[0].double().square().sum(dim=(0, 1)).numpy()
            expected[name] = expected.get(name, 0) + total

        model.get_submodule(name).register_forward_pre_hook(add)

    for layer in range(2):
        for linear in LINEAR_LAYERS:
            watch(f"model.layers.{layer}.{linear}")
    with torch.inference_mode():
        model(torch.tensor(WINDOWS))
    found = square_sums(Checkpoint(checkpoint), WINDOWS)
    assert list(found) == [f"{name}.weight" for name in expected]
    for name, sums in expected.items():
        one = found[f"{name}.weight"]
        assert one.tokens == WINDOWS.size
        np.testing.assert_allclose(one.sums, sums, rtol=1e-5)


def test_sums_do_not_depend_on_threads(checkpoint: Path) -> None:
    opened = Checkpoint(checkpoint)
    one, two = (square_sums(opened, WINDOWS, threads=threads) for threads in (1, 2))
    for name in one:
        assert np.array_equal(one[name].sums, two[name].sums)


def test_the_stage_writes_llama_cpps_format(checkpoint: Path, tmp_path: Path) -> None:
    opened, params = Checkpoint(checkpoint), ImatrixParams(**SHORT)
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        facts = Imatrix().run(params, StageContext(tmp_path / name, (), opened, threads=2))
        written.append((tmp_path / name / IMATRIX_FILE).read_bytes())
    assert written[0] == written[1]
    assert facts["entries"] == 8
    assert facts["tokens"] == 2 * 48
    reader = gguf.GGUFReader(tmp_path / "a" / IMATRIX_FILE)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert (keys["imatrix.chunk_count"], keys["imatrix.chunk_size"]) == (2, 48)
    assert keys["imatrix.datasets"] == [f"default {facts['ids_digest']}"]
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == (256, 1)
    assert shapes["blk.1.ffn_down.weight.counts"] == (1, 1)
    matrix = load_importance(tmp_path / "a" / IMATRIX_FILE)
    windows = load_token_set("default", opened, windows=2, window_length=48,
                             packaged="calibration").windows  # fmt: skip
    sums = square_sums(opened, windows)["model.layers.0.self_attn.o_proj.weight"].sums
    expected = sums.astype(np.float32) / np.float32(96)
    assert np.array_equal(matrix.means()["blk.0.attn_output.weight"], expected)


@pytest.mark.skipif(llama_cpp_oracle.missing() is not None, reason=str(llama_cpp_oracle.missing()))
def test_a_computed_matrix_weighs_the_columns(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    (tmp_path / "imatrix").mkdir()
    opened = Checkpoint(checkpoint)
    Imatrix().run(ImatrixParams(**SHORT), StageContext(tmp_path / "imatrix", (), opened))
    (tmp_path / "out").mkdir()
    artifact = Artifact("imatrix", "imatrix", "0" * 64, tmp_path / "imatrix")
    params = ConvertGgufParams.model_validate({"file_type": "Q4_K_S", "importance": SHORT})
    ConvertGguf().run(params, StageContext(tmp_path / "out", (artifact,), opened, threads=2))
    means = load_importance(tmp_path / "imatrix" / IMATRIX_FILE).means()
    weights = load_file(checkpoint / "model.safetensors")
    stored = tensors(tmp_path / "out")
    for name, source in {
        "blk.0.ffn_up.weight": "model.layers.0.mlp.gate_up_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "output.weight": "lm_head.weight",
    }.items():
        kind, _, data = stored[name]
        values = weights[source].astype(np.float32)
        assert data == llama_cpp_oracle.quantize(values, kind, means.get(name)).tobytes()
    keys = metadata(tmp_path / "out")
    assert keys["quantize.imatrix.entries_count"] == 8
    assert keys["quantize.imatrix.chunks_count"] == 2
    assert keys["quantize.imatrix.dataset"].startswith("default sha256:")


def test_the_plan_adds_one_matrix_for_all(checkpoint: Path, tmp_path: Path) -> None:
    found = plan(checkpoint, tmp_path, {"importance": SHORT}, {"importance": SHORT, "name": "y"},
                 {"importance": {**SHORT, "windows": 3}}, {})  # fmt: skip
    assert [step.id for step in found.steps if step.stage.name == "imatrix"] == [
        "imatrix",
        "gguf2.imatrix",
    ]
    keys = [found.step(f"gguf{index}").key for index in range(4)]
    assert len(set(keys)) == 4


def test_a_file_counts_by_its_content(checkpoint: Path, tmp_path: Path) -> None:
    matrix = importance(checkpoint)
    for name in ("one.gguf", "two.gguf"):
        matrix.save(checkpoint.parent / name)
    keys = {
        plan(checkpoint, tmp_path, {"importance": {"file": name}}).step("gguf0").key
        for name in ("one.gguf", "two.gguf")
    }
    assert len(keys) == 1
    with pytest.raises(PhiconvError, match="there is no file"):
        plan(checkpoint, tmp_path, {"importance": {"file": "three.gguf"}})
    with pytest.raises(PhiconvError, match="window_length 4096 exceeds"):
        plan(checkpoint, tmp_path, {"importance": {"window_length": 4096}})
    with pytest.raises(ValidationError, match="a file needs no windows"):
        ConvertGgufParams.model_validate(
            {"file_type": "Q4_0", "importance": {"file": "x", "windows": 1}}
        )


def test_it_is_read_as_it_was_written(tmp_path: Path, checkpoint: Path) -> None:
    matrix = importance(checkpoint)
    matrix.save(tmp_path / "x.gguf")
    found = load_importance(tmp_path / "x.gguf")
    assert found.counts == matrix.counts
    assert (found.datasets, found.chunks, found.chunk_size) == (("seeded",), 2, 512)
    for name, sums in matrix.sums.items():
        assert np.array_equal(found.sums[name], sums)
    nothing = ImportanceMatrix({"a": np.zeros(3, np.float32)}, {"a": 0}, (), 0, 0)
    assert nothing.means()["a"].tolist() == [1, 1, 1]


def test_another_models_matrix_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    matrix = importance(checkpoint)
    settings = {"file": str(tmp_path / "x.gguf")}
    narrow = {name: sums[:-1] for name, sums in matrix.sums.items()}
    without = {name: sums for name, sums in matrix.sums.items() if name != "blk.1.ffn_up.weight"}
    for sums, message in (
        (narrow, "its blk.0.attn_output.weight does not fit"),
        (without, "it has no blk.1.ffn_up.weight"),
        ({**matrix.sums, "blk.7.ffn_up.weight": np.ones(256, np.float32)}, "its blk.7"),
    ):
        counts = dict.fromkeys(sums, 10)
        ImportanceMatrix(sums, counts, ("x",), 1, 10).save(tmp_path / "x.gguf")
        with pytest.raises(StageError, match="not this model's") as caught:
            convert(checkpoint, tmp_path / message.split()[-1], "Q4_0", importance=settings)
        assert message in caught.value.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_no_sums_of_squares(value: float, tmp_path: Path) -> None:
    sums = {"blk.0.ffn_up.weight": np.array([1, value, 2], np.float32)}
    ImportanceMatrix(sums, dict.fromkeys(sums, 1), ("x",), 1, 1).save(tmp_path / "x.gguf")
    with pytest.raises(StageError, match="no sum of squares"):
        load_importance(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("rows", "counts"), [(1, None), (1, (2, 1)), (2, (1, 1))], ids=["none", "two", "two matrices"]
)
def test_a_matrix_has_one_count(rows: int, counts: tuple[int, int] | None, tmp_path: Path) -> None:
    """Files of llama-imatrix hold several of both for a mixture of experts."""
    import gguf

    def save(rows: int, counts: tuple[int, int] | None) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", arch="")
        writer.add_type("imatrix")
        writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.ones((rows, 3), np.float32))
        if counts is not None:
            writer.add_tensor("blk.0.ffn_up.weight.counts", np.full(counts, 4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "x.gguf"

    with pytest.raises(
        StageError, match=r"blk\.0\.ffn_up\.weight is not one matrix with one count"
    ):
        load_importance(save(rows, counts))
    found = load_importance(save(1, (1, 1)))
    assert (found.counts, found.datasets) == ({"blk.0.ffn_up.weight": 4}, ())


def test_what_is_no_importance_matrix(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00legacy")
    with pytest.raises(StageError, match="not a GGUF file"):
        load_importance(tmp_path / "old.dat")
    convert(checkpoint, tmp_path / "model", "Q8_0")
    with pytest.raises(StageError, match="not an importance matrix"):
        load_importance(tmp_path / "model" / "model.gguf")


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from tests.gguf.test_writer import change

    folder = write_phi3_checkpoint(tmp_path / "model", dtype="f32")
    change(folder, "model.layers.1.input_layernorm.weight", (0,), 1e30)
    with pytest.raises((StageError, CheckpointError), match=r"into model\.layers\.1\.\S+ is not"):
        square_sums(Checkpoint(folder), WINDOWS)
