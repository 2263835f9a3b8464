"""Every rule of the lint on one planted fault, and clean artifacts without a finding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from phiconv.checkpoint import Checkpoint, resolve
from phiconv.parity.genai_config import lint_genai_config
from phiconv.parity.results import Finding
from tests.onnx_artifacts import write_onnx_artifact
from tests.parity.conftest import Broken
from tests.phi3_checkpoints import write_phi3_checkpoint

Json = dict[str, Any]


def set_value(path: str, value: Any) -> Callable[[Json], None]:
    """Sets the value under a dotted path; None removes it."""

    def change(document: Json) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            document = document[parent]
        if value is None:
            del document[last]
        else:
            document[last] = value

    return change


def only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


# path, value, severity, what begins with, expected holds, found holds
CONFIG_FAULTS = [
    ("model.eos_token_id", 3, "error", "model.eos_token_id lacks 6 '<|end|>'", "3 '<|", "3 '<|"),
    ("model.eos_token_id", [6], "error", "model.eos_token_id lacks 3 '<|endoftext|>'", "3", "6"),
    ("model.eos_token_id", [3, 6, 50], "error", "model.eos_token_id holds 50 ", "3", "50"),
    ("model.eos_token_id", [3, 6, 7], "warning", "model.eos_token_id holds 7 '<|user|>'", "", ""),
    ("model.eos_token_id", [3, 6, 9999], "error", "model.eos_token_id holds 9999", "", "9999"),
    ("model.eos_token_id", None, "error", "model.eos_token_id", "6 '<|end|>'", "nothing"),
    ("model.eos_token_id", "3", "error", "model.eos_token_id", "6 '<|end|>'", "'3'"),
    ("model.pad_token_id", 0, "error", "model.pad_token_id", "3 '<|endoftext|>'", "0 '<unk>'"),
    ("model.bos_token_id", 2, "error", "model.bos_token_id", "1 '<s>'", "2 '</s>'"),
    ("model.bos_token_id", None, "error", "model.bos_token_id", "1 '<s>'", "nothing"),
    ("model.vocab_size", 351, "error", "model.vocab_size", "352", "351"),
    (
        "model.decoder.outputs.present_value_names",
        "present.%d.key",
        "error",
        "model.decoder.outputs.present_value_names is the name of present_key_names, too",
        "a name of its own",
        "present.%d.key",
    ),
    ("model.type", "llama", "warning", "model.type", "phi3", "llama"),
    ("model.context_length", 1024, "error", "model.context_length", "512", "1024"),
    ("model.decoder.head_size", 64, "error", "model.decoder.head_size", "32", "64"),
    ("model.decoder.hidden_size", 64, "error", "model.decoder.hidden_size", "128", "64"),
    ("model.decoder.num_attention_heads", 2, "error", "model.decoder.num_att", "4", "2"),
    ("model.decoder.num_hidden_layers", 1, "error", "model.decoder.num_hidden", "2", "1"),
    ("model.decoder.num_key_value_heads", 4, "error", "model.decoder.num_key", "2", "4"),
    ("search.do_sample", True, "warning", "search.do_sample", "False", "True"),
    ("search.repetition_penalty", 1.1, "warning", "search.repetition_penalty", "1.0", "1.1"),
    ("search.max_length", 513, "error", "search.max_length", "512", "513"),
    ("model.decoder.filename", "other.onnx", "error", "model.decoder.filename: other", "", ""),
    ("model.decoder.filename", "../model.onnx", "error", "model.decoder.filename", "", "../"),
    ("model.decoder.filename", None, "error", "model.decoder.filename", "", "None"),
    (
        "model.decoder.inputs.position_ids",
        "position_ids",
        "warning",
        "model.decoder.inputs.position_ids: the graph has no input 'position_ids'",
        "",
        "0 of 1",
    ),
    (
        "model.decoder.outputs.logits",
        "scores",
        "error",
        "model.decoder.outputs.logits: the graph has no output 'scores'",
        "scores",
        "0 of 1",
    ),
]


@pytest.mark.parametrize(("path", "value", "severity", "what", "expected", "found"), CONFIG_FAULTS)
def test_config_fault(
    path: str,
    value: Any,
    severity: str,
    what: str,
    expected: str,
    found: str,
    broken: Broken,
    checkpoint: Checkpoint,
) -> None:
    folder = broken.edit("genai_config.json", set_value(path, value))
    finding = only(lint_genai_config(folder, checkpoint, provider="cpu"))
    assert finding.severity == severity
    assert finding.what.startswith(what)
    assert expected in finding.expected
    assert found in finding.found
    assert finding.remedy


def test_shorter_context_is_a_warning(broken: Broken, checkpoint: Checkpoint) -> None:
    def shorten(config: Json) -> None:
        config["model"]["context_length"] = 256
        config["search"]["max_length"] = 256

    finding = only(lint_genai_config(broken.edit("genai_config.json", shorten), checkpoint))
    assert (finding.severity, finding.what) == ("warning", "model.context_length")


def test_renamed_input_is_found_on_both_sides(broken: Broken, checkpoint: Checkpoint) -> None:
    change = set_value("model.decoder.inputs.input_ids", "tokens")
    findings = lint_genai_config(broken.edit("genai_config.json", change), checkpoint)
    assert [finding.what for finding in findings] == [
        "model.decoder.inputs.input_ids: the graph has no input 'tokens'",
        "graph input 'input_ids' is not in model.decoder.inputs",
    ]


def test_renamed_cache_input_of_one_layer(broken: Broken, checkpoint: Checkpoint) -> None:
    model = ir.load(broken.path / "model.onnx")
    next(v for v in model.graph.inputs if v.name == "past_key_values.1.key").name = "kv.1.key"
    ir.save(model, broken.path / "model.onnx")
    findings = lint_genai_config(broken.path, checkpoint)
    assert [finding.what for finding in findings] == [
        "model.decoder.inputs.past_key_names: the graph has no input 'past_key_values.1.key'",
        "graph input 'kv.1.key' is not in model.decoder.inputs",
    ]
    assert findings[0].found == "1 of 2 in the graph"


def test_graph_of_another_vocabulary(
    broken: Broken, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    other = write_phi3_checkpoint(tmp_path / "other", vocab_size=384, num_key_value_heads=4)
    artifact = write_onnx_artifact(other, tmp_path / "other-artifact")
    for name in ("model.onnx", "model.onnx.data"):
        (artifact / name).replace(broken.path / name)
    findings = lint_genai_config(broken.path, checkpoint)
    assert [(finding.what, finding.found) for finding in findings] == [
        ("shape of past_key_values.0.key: num_key_value_heads", "4"),
        ("shape of logits: vocab_size", "384"),
    ]


def test_external_data(broken: Broken, checkpoint: Checkpoint) -> None:
    data = broken.path / "model.onnx.data"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:-1])
    finding = only(lint_genai_config(broken.path, checkpoint))
    assert finding.what == "external data 'model.onnx.data'"
    assert finding.found == f"{size - 1} bytes"
    data.unlink()
    assert only(lint_genai_config(broken.path, checkpoint)).found == "none"


def test_model_that_is_no_onnx(broken: Broken, checkpoint: Checkpoint) -> None:
    (broken.path / "model.onnx").write_bytes(b"\xff" * 100)
    finding = only(lint_genai_config(broken.path, checkpoint))
    assert finding.what == "model.onnx cannot be read"


def test_graph_that_takes_no_names_from_the_config_uses_the_runtimes(
    broken: Broken, checkpoint: Checkpoint
) -> None:
    def leave_out(config: Json) -> None:
        del config["model"]["decoder"]["inputs"], config["model"]["decoder"]["outputs"]

    assert lint_genai_config(broken.edit("genai_config.json", leave_out), checkpoint) == ()


@pytest.mark.parametrize(
    ("provider", "options", "found"),
    [
        ("dml", [], "none, which is cpu"),
        ("cuda", [{"dml": {}}], "dml"),
        ("cpu", [{"cuda": {}}], "cuda"),
        ("cuda", "cuda", "none, which is cpu"),
    ],
)
def test_provider(
    provider: Any, options: Any, found: str, broken: Broken, checkpoint: Checkpoint
) -> None:
    change = set_value("model.decoder.session_options.provider_options", options)
    folder = broken.edit("genai_config.json", change)
    finding = only(lint_genai_config(folder, checkpoint, provider=provider))
    assert finding.severity == "error"
    assert (finding.expected, finding.found) == (provider, found)
    assert lint_genai_config(folder, checkpoint) == ()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": NaN}'])
def test_config_that_is_no_json_object(text: str, broken: Broken, checkpoint: Checkpoint) -> None:
    (broken.path / "genai_config.json").write_text(text, encoding="utf-8")
    finding = only(lint_genai_config(broken.path, checkpoint))
    assert finding.what == "genai_config.json cannot be read"


@pytest.mark.parametrize("value", [[], 7, "x", {"decoder": []}])
def test_config_of_the_wrong_shape_is_findings(
    value: Any, broken: Broken, checkpoint: Checkpoint
) -> None:
    folder = broken.edit("genai_config.json", lambda config: config.update(model=value))
    findings = lint_genai_config(folder, checkpoint, provider="cpu")
    assert {"model.vocab_size", "model.decoder.filename"} <= {f.what for f in findings}


# change of tokenizer.json, what begins with, expected, found
def _remove_merge(tokenizer: Json) -> None:
    tokenizer["model"]["merges"].remove(["h", "e"])


def _swap_merges(tokenizer: Json) -> None:
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _swap_entries(tokenizer: Json) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["he"], vocabulary["in"] = vocabulary["in"], vocabulary["he"]


def _added(index: int, **flags: Any) -> Callable[[Json], None]:
    return lambda tokenizer: tokenizer["added_tokens"][index].update(flags)


TOKENIZER_FAULTS = [
    (
        _remove_merge,
        "tokenizer.json: model.merges has 1 merges less and 0 more",
        "'h e'",
        "'\u0120 a'",
    ),
    (
        _swap_merges,
        "tokenizer.json: model.merges has 0 merges less and 0 more",
        "'\u0120 t'",
        "'h e'",
    ),
    (_swap_entries, "tokenizer.json: model.vocab differs in 2 entries", "id 265", "id 267"),
    (
        _added(6, special=False),
        "tokenizer.json: added token '<|end|>' (6): special",
        "True",
        "False",
    ),
    (_added(7, rstrip=True), "tokenizer.json: added token '<|user|>' (7): rstrip", "False", "True"),
    (
        _added(6, content="<|fin|>"),
        "tokenizer.json: added token '<|end|>' (6)",
        "<|end|>",
        "<|fin|>",
    ),
    (
        lambda tokenizer: tokenizer["added_tokens"].pop(6),
        "tokenizer.json: added token '<|end|>' (6) is missing",
        "an added token",
        "none",
    ),
    (
        lambda tokenizer: tokenizer["added_tokens"].append(
            {"id": 300, "content": "at", "special": True}
        ),
        "tokenizer.json: added token 'at' (300)",
        "none",
        "an added token",
    ),
]


@pytest.mark.parametrize(("change", "what", "expected", "found"), TOKENIZER_FAULTS)
def test_tokenizer_fault(
    change: Callable[[Json], None],
    what: str,
    expected: str,
    found: str,
    broken: Broken,
    checkpoint: Checkpoint,
) -> None:
    finding = only(lint_genai_config(broken.edit("tokenizer.json", change), checkpoint))
    assert finding.severity == "error"
    assert finding.what.startswith(what)
    assert expected in finding.expected
    assert found in finding.found


def test_merges_may_be_spelled_as_text(broken: Broken, checkpoint: Checkpoint) -> None:
    def join(tokenizer: Json) -> None:
        tokenizer["model"]["merges"] = [" ".join(m) for m in tokenizer["model"]["merges"]]

    assert lint_genai_config(broken.edit("tokenizer.json", join), checkpoint) == ()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tokenizer.json", "tokenizer.json is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
        ("chat_template.jinja", "the chat template is missing"),
    ],
)
def test_missing_file(name: str, what: str, broken: Broken, checkpoint: Checkpoint) -> None:
    (broken.path / name).unlink()
    assert only(lint_genai_config(broken.path, checkpoint)).what == what


def test_unreadable_file(broken: Broken, checkpoint: Checkpoint) -> None:
    (broken.path / "tokenizer.json").write_text("{", encoding="utf-8")
    assert only(lint_genai_config(broken.path, checkpoint)).what == "tokenizer.json cannot be read"


def test_template_may_be_in_tokenizer_config(broken: Broken, checkpoint: Checkpoint) -> None:
    file = broken.path / "chat_template.jinja"
    template = file.read_text(encoding="utf-8")
    file.unlink()
    change = set_value("chat_template", template)
    assert lint_genai_config(broken.edit("tokenizer_config.json", change), checkpoint) == ()


def _checkpoint_with(tmp_path: Path, name: str, change: Callable[[Json], None]) -> Path:
    folder = write_phi3_checkpoint(tmp_path / "checkpoint")
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    change(document)
    (folder / name).write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_turn_end_must_stop_generation_though_no_config_names_it(tmp_path: Path) -> None:
    path = _checkpoint_with(tmp_path, "generation_config.json", set_value("eos_token_id", 3))
    artifact = write_onnx_artifact(path, tmp_path / "artifact")
    checkpoint = resolve(str(path), None, None)
    finding = only(lint_genai_config(artifact, checkpoint))
    assert finding.what == (
        "model.eos_token_id lacks 6 '<|end|>', which ends a turn of the chat template"
    )


def test_sampling_defaults_count_when_the_model_samples(tmp_path: Path) -> None:
    def sample(generation: Json) -> None:
        generation.update(do_sample=True, temperature=0.7, top_p=0.9)

    path = _checkpoint_with(tmp_path, "generation_config.json", sample)
    artifact = write_onnx_artifact(path, tmp_path / "artifact")
    checkpoint = resolve(str(path), None, None)
    assert lint_genai_config(artifact, checkpoint) == ()
    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    config["search"]["temperature"] = 1.0
    (artifact / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    finding = only(lint_genai_config(artifact, checkpoint))
    assert (finding.severity, finding.what) == ("warning", "search.temperature")


def test_control_token_that_is_ordinary_in_the_checkpoint(tmp_path: Path) -> None:
    def make_ordinary(tokenizer: Json) -> None:
        tokenizer["added_tokens"][4]["special"] = False
        del tokenizer["added_tokens"][7], tokenizer["model"]["vocab"]["<|user|>"]

    path = _checkpoint_with(tmp_path, "tokenizer.json", make_ordinary)
    artifact = write_onnx_artifact(path, tmp_path / "artifact")
    findings = lint_genai_config(artifact, resolve(str(path), None, None))
    assert [(f.severity, f.what, f.found) for f in findings] == [
        ("warning", "the chat template's control token '<|assistant|>'", "special: false"),
        ("warning", "the chat template's control token '<|user|>'", "7 tokens"),
    ]
