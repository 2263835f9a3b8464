"""`phiconv validate` on small real artifacts that no recipe made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.report.document import read_report
from phiconv.stages.convert_gguf import ConvertGguf, ConvertGgufParams
from phiconv.stages.stage import StageContext
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.terminal import Done, Terminal

SHORT = ("--windows", "3", "--window-length", "64")
REPORTS = {"report.json", "report.md", "junit.xml", "report.html", "positions.npz"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    return write_onnx_artifact(checkpoint, checkpoint.parent / "my model" / "artifact")


@pytest.fixture
def validate(phiconv: Terminal, checkpoint: Path, tmp_path: Path) -> Validate:
    return Validate(phiconv, checkpoint, tmp_path / "out")


class Validate:
    """`phiconv validate` with the options that every test wants."""

    def __init__(self, phiconv: Terminal, checkpoint: Path, out: Path) -> None:
        self._phiconv, self._checkpoint, self.out = phiconv, checkpoint, out

    def __call__(self, artifact: Path, *options: str) -> Done:
        return self._phiconv(
            "validate", str(artifact), "--reference", str(self._checkpoint), "--out",
            str(self.out), *SHORT, *options,
        )  # fmt: skip


def edited(artifact: Path, folder: Path) -> Path:
    return shutil.copytree(artifact, folder)


def test_an_artifact_is_measured_once_and_judged_as_often_as_one_likes(
    validate: Validate, artifact: Path, tmp_path: Path
) -> None:
    validate.out.mkdir()
    (validate.out / "mine.txt").write_text("stays")
    done = validate(artifact)
    assert done.code == 0, done.err
    assert "validate: done in" in done.err
    assert "my-model: passed on CPUExecutionProvider" in done.out
    assert "kl_divergence.mean" in done.out
    assert "max 0.1   passed" in done.out, "the default gates"
    assert "kernels        clean  static CPUExecutionProvider kernel check, nothing" in done.out
    assert str(artifact) in done.out
    assert {path.name for path in validate.out.iterdir()} == {*REPORTS, "mine.txt"}
    text = (validate.out / "report.json").read_text(encoding="utf-8")
    result = read_report(text, "report.json")
    assert {file.path for file in result.files} >= {"model.onnx", "model.onnx.data"}
    assert all(file.digest.startswith("blake3:") for file in result.files)
    assert {record.kind for record in result.tensor_kinds} >= {"attention", "mlp", "lm_head"}
    assert str(tmp_path) not in text

    copy = edited(artifact, tmp_path / "elsewhere")
    again = validate(copy, "--set-gate", "kl_divergence.mean.max=-1", "--quiet")
    assert again.code == 4
    assert again.err == ""
    assert "failed: kl_divergence.mean measured" in again.out
    assert "limit max -1, provider CPUExecutionProvider, tokens default 3x64" in again.out
    (record,) = read_report((validate.out / "report.json").read_text(), "").stages[-1:]
    assert record.cached, "other gates, and another place, run no model again"


def test_a_changed_weight_is_measured_anew_and_caught_by_a_default_gate(
    validate: Validate, artifact: Path, tmp_path: Path
) -> None:
    assert validate(artifact).code == 0
    copy = edited(artifact, tmp_path / "spoilt")
    with (copy / "model.onnx.data").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\x7f\x3f" * 20_000)
    done = validate(copy)
    assert done.code == 4, done.out
    assert "validate: done in" in done.err
    assert "reference: cached" in done.err
    assert "failed: top1_agreement measured" in done.out


def test_gates_of_a_file_replace_the_default_ones(
    validate: Validate, artifact: Path, tmp_path: Path
) -> None:
    gates = tmp_path / "gates.yaml"
    gates.write_text("{}\n")
    done = validate(artifact, "--gates", str(gates))
    assert done.code == 0
    assert "measured on CPUExecutionProvider" in done.out, "nothing was judged"
    gates.write_text("kl_divergence.mean: {max: 0.1}\nlogit_error.mx: {max: 1}\n")
    done = validate(artifact, "--gates", str(gates))
    assert done.code == 2
    assert f"{gates}:2" in done.err
    assert "did you mean 'logit_error.max'?" in done.err
    done = validate(artifact, "--set-gate", "top1_agrement.min=0.9")
    assert done.code == 2
    assert "did you mean 'top1_agreement'?" in done.err
    assert validate(artifact, "--set-gate", "top1_agreement=0.9").code == 2


def test_genai_decodes_and_generates(validate: Validate, artifact: Path) -> None:
    genai = ("--runtime", "onnxruntime-genai", "--generate-tokens", "8")
    done = validate(artifact, *genai)
    assert done.code == 0, done.out + done.err
    assert re.search(r"^ +greedy_agreement +1 +min 0.85 +passed$", done.out, re.MULTILINE)
    done = validate(artifact, *genai, "--set-gate", "decode_error.max.max=-1", "-q")
    assert done.code == 4
    done = validate(
        artifact, *genai, "--set-gate", "greedy_agreement.min=1",
        "--set-gate", "decode_error.max.max=1e-3",
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert "every node on CPUExecutionProvider" in done.out


class TestGgufFiles:
    @pytest.fixture(scope="class")
    def gguf(self, checkpoint: Path) -> Path:
        pytest.importorskip("xllamacpp")
        out = checkpoint.parent / "gguf"
        out.mkdir()
        params = ConvertGgufParams(file_type="Q8_0")
        ConvertGguf().run(params, StageContext(out, (), Checkpoint(checkpoint)))
        (file,) = out.glob("*.gguf")
        return file

    def test_llama_cpp_runs_them(self, validate: Validate, gguf: Path) -> None:
        done = validate(gguf, "--generate-tokens", "8")
        assert done.code == 0, done.out + done.err
        assert f"{gguf.stem}: passed on llama.cpp" in done.out
        assert "decode_error.max" in done.out
        again = validate(gguf.parent, "--generate-tokens", "8", "--quiet")
        assert again.code == 0
        result = read_report((validate.out / "report.json").read_text(), "")
        assert result.stages[-1].cached, "the folder and the file in it are the same artifact"
        assert [file.path for file in result.files] == [gguf.name]

    def test_no_other_runtime_does(self, validate: Validate, gguf: Path, artifact: Path) -> None:
        done = validate(gguf, "--runtime", "onnxruntime")
        assert done.code == 2
        assert "runtime onnxruntime does not run an artifact of kind gguf" in done.err
        done = validate(artifact, "--runtime", "llama.cpp")
        assert done.code == 2
        assert "runtime llama.cpp does not run an artifact of kind onnx" in done.err

    def test_a_file_that_is_none(self, validate: Validate, gguf: Path, tmp_path: Path) -> None:
        (tmp_path / "x.gguf").write_bytes(gguf.read_bytes()[:1000])
        done = validate(tmp_path / "x.gguf")
        assert done.code == 3
        assert done.err.count("error: ") == 1


def test_tokens_of_ones_own(validate: Validate, artifact: Path, tmp_path: Path) -> None:
    texts = tmp_path / "own.txt"
    texts.write_text("the cat sat on the mat and then it ran away again. " * 40)
    done = validate(artifact, "--tokens", str(texts), "--windows", "2")
    assert done.code == 0, done.out + done.err
    assert "artifact on own.txt 2x64" in done.out
    assert validate(artifact, "--tokens", str(tmp_path / "absent.txt")).code == 2


class TestBrokenArtifacts:
    def check(self, validate: Validate, artifact: Path, message: str, code: int = 3) -> None:
        done = validate(artifact)
        assert done.code == code
        assert done.err.count("error: ") == 1
        assert message in done.err
        assert "Traceback" not in done.err
        assert not validate.out.exists()

    def test_missing_data(self, validate: Validate, artifact: Path, tmp_path: Path) -> None:
        copy = edited(artifact, tmp_path / "copy")
        (copy / "model.onnx.data").unlink()
        self.check(validate, copy, "error: the model's external data model.onnx.data is missing")

    def test_data_outside(self, validate: Validate, artifact: Path, tmp_path: Path) -> None:
        copy = edited(artifact, tmp_path / "copy")
        model = onnx.load(copy / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../model.onnx.data"
        onnx.save(model, copy / "model.onnx")
        (copy / "model.onnx.data").rename(tmp_path / "model.onnx.data")
        self.check(validate, copy, "'../model.onnx.data' leads out of its folder")

    def test_another_vocabulary(self, validate: Validate, tmp_path: Path) -> None:
        other = write_phi3_checkpoint(tmp_path / "other", vocab_size=416)
        onnx_folder = write_onnx_artifact(other, tmp_path / "onnx")
        self.check(validate, onnx_folder, "the artifact's vocabulary is 416, the checkpoint's is")

    def test_no_decoder(self, validate: Validate, tmp_path: Path) -> None:
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        )  # fmt: skip
        (tmp_path / "neg").mkdir()
        onnx.save(onnx.helper.make_model(graph), tmp_path / "neg" / "model.onnx")
        self.check(validate, tmp_path / "neg", "not a decoder that ONNX Runtime GenAI could run")

    def test_a_folder_without_a_model_or_no_folder(
        self, validate: Validate, checkpoint: Path, tmp_path: Path
    ) -> None:
        self.check(validate, checkpoint, "the .onnx files are: none")
        self.check(validate, tmp_path / "absent", "there is no folder", code=2)


class TestWithoutTheProvider:
    @pytest.fixture(autouse=True)
    def only_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "providers", lambda: (machine.CPU,))

    @pytest.fixture(scope="class")
    def cuda(self, checkpoint: Path) -> Path:
        return write_onnx_artifact(checkpoint, checkpoint.parent / "cuda", "cuda", "fp16")

    def test_require_exits_with_5(self, validate: Validate, cuda: Path) -> None:
        done = validate(cuda, "--provider", "cuda")
        assert done.code == 5
        assert "needs CUDAExecutionProvider, which is not present" in done.err

    def test_fallback_says_so(self, validate: Validate, cuda: Path) -> None:
        done = validate(cuda, "--provider", "cuda", "--when-missing", "fallback-cpu")
        assert done.code == 0, done.out
        verdict = "passed on CPUExecutionProvider, target CUDAExecutionProvider not present"
        assert verdict in done.out
        assert "static CUDAExecutionProvider kernel check, nothing amiss" in done.out

    def test_skip_is_no_success(self, validate: Validate, cuda: Path) -> None:
        done = validate(cuda, "--provider", "cuda", "--when-missing", "skip")
        assert done.code == 5
        assert "not run, target CUDAExecutionProvider not present" in done.out

    def test_a_graph_for_the_cpu_cannot_go_to_cuda(
        self, validate: Validate, artifact: Path
    ) -> None:
        for when_missing in ("fallback-cpu", "skip"):
            done = validate(artifact, "--provider", "cuda", "--when-missing", when_missing)
            assert done.code == 4
            assert "failed: kernels.unserved measured 2, limit max 0" in done.out
            assert "GroupQueryAttention /model/layers.0/attn/GroupQueryAttention" in done.out


def test_the_default_folder_is_named_after_the_artifact(
    phiconv: Terminal, artifact: Path, checkpoint: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = phiconv("validate", str(artifact), "--reference", str(checkpoint), *SHORT)
    assert done.code == 0, done.err
    out = tmp_path / "dist" / "my-model-validation"
    assert {path.name for path in out.iterdir()} == REPORTS
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert document["result"]["recipe"] == "my-model"


def test_length_probes_on_request(phiconv: Terminal, tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "checkpoint", sliding_window=40)
    artifact = write_onnx_artifact(source, tmp_path / "artifact")
    out = tmp_path / "out"
    done = phiconv(
        "validate", str(artifact), "--reference", str(source), "--out", str(out), *SHORT,
        "--runtime", "onnxruntime-genai", "--length-probes",
    )  # fmt: skip
    assert "length probes  clean  2 compared, none leaves the reference" in done.out
    (found,) = read_report((out / "report.json").read_text(encoding="utf-8"), "out").validations
    assert [probe.position for probe in found.measurement.length_probes] == [40, 40]
