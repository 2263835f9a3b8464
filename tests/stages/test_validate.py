from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pydantic import ValidationError

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.gates import judge
from phiconv.metrics import METRICS
from phiconv.report.document import read_measurement
from phiconv.report.results import Validation
from phiconv.runtimes.stored_reference import load_reference
from phiconv.stages.layer_errors import measure
from phiconv.stages.reference import Reference, TokenSetParams
from phiconv.stages.stage import Artifact, Prerequisites, StageContext
from phiconv.stages.validate import Validate, ValidateParams
from tests.diagnosis.planting import change, node, planted
from tests.onnx.models import hugging_face_logits
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint

CPU = machine.CPU
SHORT = {"windows": 3, "window_length": 64}


@dataclass
class Recorder:
    """A `Progress` that keeps what it is told."""

    total: int | None = None
    done: int = 0
    items: list[str] = field(default_factory=list)

    def start(self, total: int | None, unit: str = "bytes") -> None:
        self.total = total

    def advance(self, amount: int, what: str | None = None) -> None:
        self.done += amount
        self.items.append(what or "")

    def note(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Workshop:
    """A checkpoint, its reference over three short windows and its fp32 artifact."""

    checkpoint: Checkpoint
    reference: Artifact
    onnx: Artifact

    def validate(self, out: Path, onnx: Path | None = None, **params: Any) -> Validation:
        out.mkdir()
        artifact = self.onnx if onnx is None else Artifact("edited", "onnx", "0" * 64, onnx)
        context = StageContext(out, (artifact, self.reference), self.checkpoint, threads=2)
        parsed = ValidateParams(**SHORT, **params)
        Validate().run(parsed, context)
        measurement = read_measurement(out)
        return Validation("check", artifact.id, measurement, judge(measurement, parsed.limits()))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("validate")
    path = write_phi3_checkpoint(folder / "checkpoint", sliding_window=40)
    checkpoint = Checkpoint(path)
    progress = Recorder()
    (folder / "reference").mkdir()
    context = StageContext(folder / "reference", (), checkpoint, threads=2, progress=progress)
    facts = Reference().run(TokenSetParams(**SHORT), context)
    assert progress.total == progress.done == 3 * 64 * 2
    assert facts["tokens"] == 192
    return Workshop(
        checkpoint,
        Artifact("reference", "reference", "1" * 64, folder / "reference"),
        Artifact("onnx", "onnx", "2" * 64, write_onnx_artifact(path, folder / "onnx")),
    )


def test_the_reference_is_stored_without_its_logits(workshop: Workshop) -> None:
    found = load_reference(workshop.reference.path)
    assert found.hidden.shape == (3, 64, 128)
    assert found.hidden.dtype == np.float32
    assert found.windows.shape == (3, 64)
    assert (found.tokens.name, found.tokens.windows, found.tokens.window_length) == (
        "default",
        3,
        64,
    )
    assert found.tokens.sources
    assert set(found.versions) == {"torch", "transformers"}


def test_two_references_are_the_same_bytes(workshop: Workshop, tmp_path: Path) -> None:
    context = StageContext(tmp_path, (), workshop.checkpoint, threads=1)
    Reference().run(TokenSetParams(**SHORT), context)
    for file in workshop.reference.path.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_broken_reference_is_a_stage_error(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="not a reference"):
        load_reference(tmp_path)
    (tmp_path / "reference.json").write_text("{}")
    with pytest.raises(StageError, match="not a reference"):
        load_reference(tmp_path)


def test_an_fp32_export_measures_as_hugging_face(workshop: Workshop, tmp_path: Path) -> None:
    found = workshop.validate(
        tmp_path / "out",
        gates={"logit_error.max": {"max": 1e-4}, "top1_agreement": {"min": 1.0}},
    )
    assert found.verdict == "passed on CPUExecutionProvider"
    metrics = found.measurement.metrics
    assert set(metrics) == {
        name for name, m in METRICS.items() if m.source not in ("generation", "length")
    }
    assert metrics["kl_divergence.max"] < 1e-9
    assert metrics["perplexity.ratio"] == pytest.approx(1, abs=1e-5)
    windows = load_reference(workshop.reference.path).windows
    logits = np.stack([hugging_face_logits(workshop.checkpoint.path, w) for w in windows])
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_p[:, :-1], windows[:, 1:, None], axis=-1)
    assert metrics["perplexity.reference"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
    assert found.measurement.provenance.placement[CPU]["GroupQueryAttention"] == 2


def test_the_values_of_every_position_are_kept(workshop: Workshop, tmp_path: Path) -> None:
    found = workshop.validate(tmp_path / "out")
    with np.load(tmp_path / "out" / "positions.npz") as arrays:
        kl = arrays["kl_divergence"]
        assert kl.shape == (3, 64)
        assert kl.dtype == np.float32
        log_p = arrays["reference_log_probability"]
        assert np.isnan(log_p[:, -1]).all()
        assert np.isfinite(log_p[:, :-1]).all()
    assert found.measurement.metrics["kl_divergence.mean"] == pytest.approx(kl.mean(), rel=1e-5)
    histogram = found.measurement.kl_histogram
    assert histogram is not None
    assert sum(histogram.counts) == 192


def test_the_measurement_is_the_same_bytes_every_time(workshop: Workshop, tmp_path: Path) -> None:
    for name in ("a", "b"):
        workshop.validate(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_another_artifact_fails_its_gates_with_one_line_each(
    workshop: Workshop, tmp_path: Path
) -> None:
    other = write_phi3_checkpoint(tmp_path / "other", seed=1)
    found = workshop.validate(
        tmp_path / "out",
        write_onnx_artifact(other, tmp_path / "onnx"),
        gates={"top1_agreement": {"min": 0.9}, "kl_divergence.mean": {"max": 0.1, "min": 0}},
    )
    assert found.verdict == "failed on CPUExecutionProvider"
    lines = [str(gate) for gate in found.gates if not gate.passed]
    assert len(lines) == 2
    assert lines[0].startswith("failed: top1_agreement measured 0")
    assert "limit min 0.9, provider CPUExecutionProvider, tokens default 3x64 (" in lines[0]


def test_genai_decodes_as_it_prefills_and_generates_as_the_reference(
    workshop: Workshop, tmp_path: Path
) -> None:
    found = workshop.validate(
        tmp_path / "out",
        runtime="onnxruntime-genai",
        generate_tokens=24,
        gates={"decode_error.max": {"max": 1e-4}, "greedy_agreement": {"min": 1.0}},
    )
    assert found.status == "passed"
    assert found.measurement.provenance.runtime == "onnxruntime-genai"
    assert found.measurement.metrics["logit_error.max"] < 1e-4


def test_genai_finds_a_generation_that_is_not_the_references(
    workshop: Workshop, tmp_path: Path
) -> None:
    other = write_phi3_checkpoint(tmp_path / "other", seed=1)
    found = workshop.validate(
        tmp_path / "out",
        write_onnx_artifact(other, tmp_path / "onnx"),
        runtime="onnxruntime-genai",
        generate_tokens=24,
        gates={"greedy_agreement": {"min": 1.0}},
    )
    assert found.status == "failed"
    assert found.measurement.metrics["decode_error.max"] < 1e-4


class TestWithoutTheTargetProvider:
    @pytest.fixture(autouse=True)
    def only_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "providers", lambda: (CPU,))

    def test_require_does_no_work(self, workshop: Workshop, tmp_path: Path) -> None:
        with pytest.raises(EnvironmentLacksError) as caught:
            workshop.validate(tmp_path / "out", tmp_path / "no artifact", provider="cuda")
        assert caught.value.exit_code == 5

    def test_fallback_says_so_in_the_verdict(self, workshop: Workshop, tmp_path: Path) -> None:
        onnx = write_onnx_artifact(workshop.checkpoint.path, tmp_path / "cuda", "cuda", "fp16")
        gates = {"top1_agreement": {"min": 0.9}}
        found = workshop.validate(
            tmp_path / "out", onnx, provider="cuda", when_missing="fallback-cpu", gates=gates
        )
        assert found.verdict == (
            "passed on CPUExecutionProvider, target CUDAExecutionProvider not present"
        )
        checks = {check.name: check for check in found.measurement.checks}
        assert list(checks) == [
            "placement", "kernels", "graph", "tokenizer", "chat template", "genai_config",
            "weights",
        ]  # fmt: skip
        expected = "static CUDAExecutionProvider kernel check, nothing amiss"
        assert checks["kernels"].summary == expected
        assert checks["placement"].summary.endswith("nodes on CPUExecutionProvider")
        assert {check.state for check in checks.values()} <= {"clean", "warnings"}

    def test_skip_measures_nothing_and_is_not_passed(
        self, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        onnx = write_onnx_artifact(workshop.checkpoint.path, tmp_path / "cuda", "cuda", "fp16")
        monkeypatch.setattr("phiconv.runtimes.RUNTIMES", {})
        found = workshop.validate(
            tmp_path / "out",
            onnx,
            provider="cuda",
            when_missing="skip",
            gates={"top1_agreement": {"min": 0.0}},
        )
        assert found.status == "not_run"
        assert found.verdict == "not run, target CUDAExecutionProvider not present"
        assert all(gate.built_in and gate.passed for gate in found.gates)
        assert set(found.measurement.metrics) == {
            name
            for name, m in METRICS.items()
            if m.source in ("kernels", "graph", "parity", "weights")
        }
        assert "placement" not in {check.name for check in found.measurement.checks}

    @pytest.mark.parametrize("when_missing", ["fallback-cpu", "skip"])
    def test_attention_that_the_target_has_no_kernel_for_fails(
        self, workshop: Workshop, tmp_path: Path, when_missing: str
    ) -> None:
        gates = {"top1_agreement": {"min": 0.9}}
        found = workshop.validate(
            tmp_path / "out", provider="cuda", when_missing=when_missing, gates=gates
        )
        assert found.status == "failed"
        prefix = {"fallback-cpu": "failed on CPU", "skip": "failed before it ran; not run, "}
        assert found.verdict.startswith(prefix[when_missing])
        assert found.verdict.endswith("target CUDAExecutionProvider not present")
        failed, config = [gate for gate in found.gates if not gate.passed]
        assert config.metric == "parity.genai_config", "it is a config for the CPU"
        assert failed.built_in
        assert failed.metric == "kernels.unserved"
        assert failed.provider == machine.CUDA
        assert "/model/layers.0/attn/GroupQueryAttention" in str(failed)
        assert str(failed).endswith("(and 1 more)")

    @pytest.mark.parametrize("when_missing", ["require", "fallback-cpu", "skip"])
    def test_what_the_plan_is_told(self, when_missing: str) -> None:
        params = ValidateParams(provider="cuda", when_missing=when_missing)
        (requirement,) = Validate().requires(params)
        assert requirement.name == machine.CUDA
        assert requirement.optional == (when_missing != "require")
        provider = {"require": machine.CUDA, "fallback-cpu": CPU, "skip": None}[when_missing]
        assert Validate().key_params(params)["provider"] == provider


def test_a_wrong_config_or_tokenizer_fails_by_a_built_in_gate(
    workshop: Workshop, tmp_path: Path
) -> None:
    onnx = shutil.copytree(workshop.onnx.path, tmp_path / "edited")
    config = json.loads((onnx / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = 5
    (onnx / "genai_config.json").write_text(json.dumps(config))
    gates = {"top1_agreement": {"min": 0.9}}
    found = workshop.validate(tmp_path / "out", onnx, gates=gates)
    assert found.status == "failed"
    (line,) = [str(gate) for gate in found.gates if not gate.passed]
    assert line.startswith("failed: parity.genai_config measured 2, limit max 0, provider CPU")
    assert "model.eos_token_id" in line
    (check,) = [check for check in found.measurement.checks if check.name == "genai_config"]
    assert check.state == "errors"
    allowed = workshop.validate(
        tmp_path / "again", onnx, gates={**gates, "parity.genai_config": {"max": 2}}
    )
    assert allowed.status == "passed"


def test_a_wrong_constant_of_the_graph_fails_though_the_logits_hardly_change(
    workshop: Workshop, tmp_path: Path
) -> None:
    folder = shutil.copytree(workshop.onnx.path, tmp_path / "edited")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "SkipSimplifiedLayerNormalization")
    (epsilon,) = [item for item in node.attribute if item.name == "epsilon"]
    epsilon.f = 2 * epsilon.f
    onnx.save(model, folder / "model.onnx")
    gates = {"kl_divergence.mean": {"max": 1e-3}}
    found = workshop.validate(tmp_path / "out", folder, gates=gates)
    (line,) = [str(gate) for gate in found.gates if not gate.passed]
    assert line.startswith("failed: graph.faults measured 1, limit max 0")
    assert "epsilon" in line
    assert "in layer 0" in line


def test_an_artifact_that_does_not_run_is_told_why(workshop: Workshop, tmp_path: Path) -> None:
    def edit(model: ir.Model) -> None:
        attention = node(model, "/model/layers.1/attn/GroupQueryAttention")
        attention.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 1)

    folder = planted(workshop.onnx.path, tmp_path / "edited", edit)
    with pytest.raises(StageError) as error:
        workshop.validate(tmp_path / "out", folder)
    assert (
        "found without running it: error: attention heads of self_attn.attention in layer 1: "
        "kv_num_heads 1, the checkpoint has 2 (and "
    ) in error.value.message


def test_weights_are_compared_unless_left_out(workshop: Workshop, tmp_path: Path) -> None:
    def edit(model: ir.Model) -> None:
        change(model, "model.embed_tokens.weight", lambda rows: np.roll(rows, 1, axis=0))

    folder = planted(workshop.onnx.path, tmp_path / "edited", edit)
    found = workshop.validate(tmp_path / "out", folder)
    assert found.measurement.metrics["weights.faults"] == 1
    found = workshop.validate(tmp_path / "without", folder, weight_errors=False)
    assert "weights.faults" not in found.measurement.metrics


def test_a_graph_of_another_make_is_measured_without_its_lint(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(artifact: Path, config: object) -> None:
        raise StageError("no decoder")

    monkeypatch.setattr("phiconv.diagnosis.diagnose.lint_artifact", refuse)
    found = workshop.validate(tmp_path / "out")
    (check,) = [check for check in found.measurement.checks if check.name == "graph"]
    assert (check.state, check.summary) == ("not_checked", "cannot be read: no decoder")
    assert "graph.faults" not in found.measurement.metrics


def test_without_genai_the_tokenizer_is_not_checked(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    found = workshop.validate(tmp_path / "out", gates={"top1_agreement": {"min": 0.9}})
    assert found.status == "passed"
    states = {check.name: check.state for check in found.measurement.checks}
    assert states["tokenizer"] == states["genai_config"] == "not_checked"
    assert not any(name.startswith("parity.") for name in found.measurement.metrics)


def test_every_layer_of_an_fp32_export_is_as_the_reference(
    workshop: Workshop, tmp_path: Path
) -> None:
    layers = workshop.validate(tmp_path / "out").measurement.layers
    assert [layer.layer for layer in layers] == [-1, 0, 1], "the embedding and two layers"
    for layer in layers:
        assert layer.relative_error is not None and layer.relative_error < 1e-5
        assert layer.own_error is not None and layer.own_error < 1e-5


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_a_corrupt_weight_stands_out_at_its_layer(
    workshop: Workshop, tmp_path: Path, runtime: str
) -> None:
    weight = "model.layers.1.mlp.down_proj.MatMul.weight"
    folder = planted(
        workshop.onnx.path,
        tmp_path / "planted",
        lambda model: change(model, weight, lambda array: 1.5 * array),
    )
    for file in workshop.onnx.path.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    params = {"runtime": runtime, "generate_tokens": 4}
    embedding, first, second = workshop.validate(
        tmp_path / "out", folder, **params
    ).measurement.layers
    assert embedding.own_error is not None and embedding.own_error < 1e-5
    assert first.own_error is not None and first.own_error < 1e-5
    assert second.own_error is not None and second.own_error > 1e-3
    assert second.relative_error == pytest.approx(second.own_error, rel=1e-2), "nothing inherited"


def rename_attention(model: onnx.ModelProto) -> None:
    for operator in model.graph.node:
        if operator.op_type == "GroupQueryAttention":
            operator.op_type = "AttentionOfAnotherMake"


def add_input(model: onnx.ModelProto) -> None:
    surplus = onnx.helper.make_tensor_value_info("surplus", onnx.TensorProto.FLOAT, ["batch_size"])
    model.graph.input.append(surplus)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (rename_attention, "no decoder found: 0 attention"),
        (add_input, "the model has an unknown input surplus"),
    ],
)
def test_a_graph_that_cannot_be_read_says_so_instead_of_its_layers(
    workshop: Workshop, tmp_path: Path, edit: Callable[[onnx.ModelProto], None], why: str
) -> None:
    folder = shutil.copytree(workshop.onnx.path, tmp_path / "edited")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    onnx.save(model, folder / "model.onnx")
    layers, note = measure(
        folder,
        workshop.checkpoint,
        load_reference(workshop.reference.path).windows,
        provider=CPU,
        threads=1,
    )
    assert layers == ()
    assert note.startswith("Not measured by layer: ")
    assert why in note


def test_an_artifact_of_another_width_has_no_layers(workshop: Workshop, tmp_path: Path) -> None:
    other = write_phi3_checkpoint(
        tmp_path / "other", hidden_size=64, num_attention_heads=2, num_key_value_heads=2
    )
    layers, note = measure(
        write_onnx_artifact(other, tmp_path / "onnx"),
        workshop.checkpoint,
        load_reference(workshop.reference.path).windows,
        provider=CPU,
        threads=1,
    )
    assert layers == ()
    assert note == "Not measured by layer: the residual stream is 64 wide, the checkpoint's 128"


def test_layers_are_measured_only_when_asked_for(workshop: Workshop, tmp_path: Path) -> None:
    found = workshop.validate(tmp_path / "out", layer_errors=False).measurement
    assert (found.layers, found.layers_note) == ((), "")
    assert key(Validate(), ValidateParams(layer_errors=False)) != key(Validate(), ValidateParams())


def key(stage: Any, params: Any) -> str:
    return json.dumps(stage.key_params(params), sort_keys=True)


def test_gates_are_no_part_of_a_measurements_key() -> None:
    plain = ValidateParams()
    gated = ValidateParams(gates={"top1_agreement": {"min": 0.9}})
    assert key(Validate(), plain) == key(Validate(), gated)
    assert key(Validate(), plain) != key(Validate(), ValidateParams(runtime="onnxruntime-genai"))


def test_the_key_changes_when_the_provider_appears(monkeypatch: pytest.MonkeyPatch) -> None:
    params = ValidateParams(provider="cuda", when_missing="fallback-cpu")
    monkeypatch.setattr(machine, "providers", lambda: (CPU,))
    without = key(Validate(), params)
    monkeypatch.setattr(machine, "providers", lambda: (machine.CUDA, CPU))
    assert key(Validate(), params) != without


def test_the_references_key_has_the_texts_not_the_path(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text", encoding="utf-8")
    a, b = (TokenSetParams(tokens=str(tmp_path / name)) for name in ("a.txt", "b.txt"))
    assert key(Reference(), a) == key(Reference(), b)
    (tmp_path / "b.txt").write_text("other text", encoding="utf-8")
    assert key(Reference(), a) != key(Reference(), b)
    assert key(Reference(), a) != key(Reference(), TokenSetParams(tokens=a.tokens, windows=7))


def test_validations_on_the_same_tokens_share_a_reference() -> None:
    stage = Validate()
    assert isinstance(stage, Prerequisites)
    one = stage.prerequisites(ValidateParams(windows=4))
    two = stage.prerequisites(ValidateParams(windows=4, provider="dml", runtime="onnxruntime"))
    assert one == two
    assert one[0].uses == "reference"
    assert TokenSetParams.model_validate(dict(one[0].params)).windows == 4
    assert stage.prerequisites(ValidateParams(windows=5)) != one


def test_a_token_file_is_found_beside_the_recipe(tmp_path: Path) -> None:
    context = {"folder": tmp_path}
    parsed = ValidateParams.model_validate({"tokens": "texts.jsonl"}, context=context)
    assert parsed.tokens == str(tmp_path / "texts.jsonl")
    assert ValidateParams.model_validate({}, context=context).tokens == "default"


def test_what_cannot_work_is_found_at_plan_time(workshop: Workshop) -> None:
    config = workshop.checkpoint.config
    assert Validate().check(ValidateParams(), config) == []
    params = ValidateParams(
        tokens="/absent.jsonl",
        window_length=4096,
        runtime="onnxruntime-genai",
        generate_tokens=2000,
        gates={"top1_agrement": {"min": 0.9}},
    )
    errors = Validate().check(params, config)
    messages = [error.message for error in errors]
    assert len(errors) == 4
    assert "cannot be read" in messages[0]
    assert messages[1] == "window_length 4096 exceeds the model's context of 512"
    assert messages[2].startswith("generate_tokens 2000 after a prompt of 32")
    assert messages[3] == "unknown metric 'top1_agrement'"
    assert "did you mean 'top1_agreement'?" in (errors[3].remedy or "")
    assert all(error.exit_code == 2 for error in errors)


@pytest.mark.parametrize(
    "params",
    [
        {"provider": "rocm"},
        {"gates": {"top1_agreement": {"least": 0.9}}},
        {"windows": 0},
        {"token": "default"},
        {"when_missing": "ignore"},
    ],
)
def test_unknown_keys_and_values_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ValidateParams(**params)


def test_the_reference_estimates_what_it_takes(workshop: Workshop) -> None:
    config = workshop.checkpoint.config
    estimate = Reference().estimate(TokenSetParams(**SHORT), config, ())
    size = sum(f.stat().st_size for f in workshop.reference.path.glob("hidden.npy"))
    assert abs(estimate.disk_bytes - size) < 1000
    longer = Reference().estimate(TokenSetParams(windows=100), config, ())
    assert longer.ram_bytes > estimate.ram_bytes > 0


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_on_cuda_the_verdict_names_cuda(workshop: Workshop, tmp_path: Path, runtime: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    if runtime == "onnxruntime-genai" and not og.is_cuda_available():
        pytest.skip("the installed onnxruntime-genai was built for the CPU")
    onnx = write_onnx_artifact(workshop.checkpoint.path, tmp_path / "onnx", "cuda", "fp16")
    gates = {"kl_divergence.mean": {"max": 1e-4}}
    found = workshop.validate(tmp_path / "out", onnx, provider="cuda", runtime=runtime, gates=gates)
    assert found.verdict == "passed on CUDAExecutionProvider"
