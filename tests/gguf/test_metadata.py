from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phiconv.errors import StageError
from tests.gguf.conversions import convert, metadata
from tests.gguf.sentencepiece_tokenizer import sentencepiece_document, write_sentencepiece_tokenizer
from tests.phi3_checkpoints import write_phi3_checkpoint


def edit_json(path: Path, **values: Any) -> None:
    document = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(document | values), encoding="utf-8")


def keys(folder: Path, out: Path, **params: Any) -> dict[str, Any]:
    convert(folder, out, **params)
    return metadata(out)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_phi3_checkpoint(tmp_path / "model")


@pytest.fixture
def stripping(tmp_path: Path) -> Path:
    """A checkpoint with Phi-3's kind of vocabulary."""
    folder = write_phi3_checkpoint(
        tmp_path / "phi3", vocab_size=700, eos_token_id=592, pad_token_id=592
    )
    document = sentencepiece_document()
    write_sentencepiece_tokenizer(folder, document)
    end = next(t["id"] for t in document["added_tokens"] if t["content"] == "<|endoftext|>")
    edit_json(folder / "config.json", eos_token_id=end, pad_token_id=end)
    return folder


def test_a_phi_3_is_called_so(stripping: Path, tmp_path: Path) -> None:
    assert keys(stripping, tmp_path / "a")["general.name"] == "Phi3"
    edit_json(stripping / "config.json", _name_or_path="/train/Phi-3-mini-4k-instruct/")
    found = keys(stripping, tmp_path / "b")
    assert found["general.name"] == "Phi-3-mini-4k-instruct"
    assert (found["general.basename"], found["general.finetune"]) == ("Phi-3", "4k-instruct")
    edit_json(stripping / "config.json", _name_or_path="checkpoint-100")
    assert keys(stripping, tmp_path / "c")["general.name"] == "Phi3"
    with pytest.raises(StageError, match="must hold 'phi-3' or 'phi3'"):
        convert(stripping, tmp_path / "d", name="My Phi 3")
    assert keys(stripping, tmp_path / "e", name="My PHI-3")["general.name"] == "My PHI-3"


def test_another_vocabulary_is_not(plain: Path, tmp_path: Path) -> None:
    assert keys(plain, tmp_path / "a")["general.name"] == "Phi"
    edit_json(plain / "config.json", _name_or_path="microsoft/Phi-4-mini-instruct")
    assert keys(plain, tmp_path / "b")["general.name"] == "Phi-4-mini-instruct"
    with pytest.raises(StageError, match="must not hold 'phi-3'"):
        convert(plain, tmp_path / "c", name="tiny-phi3")


def test_licence_and_base_model(plain: Path, tmp_path: Path) -> None:
    found = keys(plain, tmp_path / "a")
    assert not any(key.startswith(("general.license", "general.base_model")) for key in found)
    (plain / "LICENSE").write_text("Microsoft.\nCopyright (c)\n\nMIT License\n\n", "utf-8")
    found = keys(plain, tmp_path / "b", base_model="microsoft/Phi-3-mini-4k-instruct")
    assert found["general.license"] == "mit"
    assert found["general.base_model.count"] == 1
    assert found["general.base_model.0.name"] == "Phi-3-mini-4k-instruct"
    assert found["general.base_model.0.organization"] == "microsoft"
    url = "https://huggingface.co/microsoft/Phi-3-mini-4k-instruct"
    assert found["general.base_model.0.repo_url"] == url
    assert keys(plain, tmp_path / "c", license="cc0-1.0")["general.license"] == "cc0-1.0"
    (plain / "LICENSE").write_text("All rights reserved.", "utf-8")
    assert "general.license" not in keys(plain, tmp_path / "d")


def test_how_to_sample_comes_from_the_generation_config(plain: Path, tmp_path: Path) -> None:
    edit_json(plain / "generation_config.json", temperature=0.7, top_k=40, repetition_penalty=1.1)
    found = keys(plain, tmp_path / "out")
    assert found["general.sampling.temp"] == pytest.approx(0.7)
    assert found["general.sampling.top_k"] == 40
    assert found["general.sampling.penalty_repeat"] == pytest.approx(1.1)
    assert "general.sampling.top_p" not in found


def test_architecture(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(
        tmp_path / "model",
        hidden_size=256,
        max_position_embeddings=2048,
        sliding_window=1000,
        partial_rotary_factor=0.75,
        rope_theta=5000.0,
        rope_scaling={
            "type": "longrope", "short_factor": [1.0] * 24, "long_factor": [2.0] * 24,
        },
    )  # fmt: skip
    found = keys(folder, tmp_path / "out")
    expected = {
        "context_length": 2048,
        "rope.scaling.original_context_length": 512,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.sliding_window": 1000,
        "rope.dimension_count": 48,
        "rope.freq_base": 5000.0,
    }
    assert {name: found[f"phi3.{name}"] for name in expected} == expected
    # transformers: sqrt(1 + ln(4) / ln(512))
    assert found["phi3.rope.scaling.attn_factor"] == pytest.approx(1.10554158)


def test_an_attention_factor_of_its_own_is_kept(tmp_path: Path) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
               "attention_factor": 1.25}  # fmt: skip
    folder = write_phi3_checkpoint(tmp_path / "model", rope_scaling=scaling)
    assert keys(folder, tmp_path / "out")["phi3.rope.scaling.attn_factor"] == 1.25


def test_special_tokens(plain: Path, stripping: Path, tmp_path: Path) -> None:
    found = keys(plain, tmp_path / "a")
    names = {"bos": 1, "eos": 3, "unknown": 0, "padding": 3, "eot": 6}
    assert {n: found[f"tokenizer.ggml.{n}_token_id"] for n in names} == names
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_eos_token"] is False
    edit_json(plain / "tokenizer_config.json", add_bos_token=True)
    assert keys(plain, tmp_path / "b")["tokenizer.ggml.add_bos_token"] is True

    document = json.loads((stripping / "tokenizer.json").read_text("utf-8"))
    special = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": special},
    }
    (stripping / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    assert keys(stripping, tmp_path / "c")["tokenizer.ggml.add_bos_token"] is True


def test_the_turn_ends_as_the_template_says(plain: Path, tmp_path: Path) -> None:
    template = plain / "chat_template.jinja"
    for text, expected in (
        ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content + ' <|user|>' }}{% endfor %}", 7),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{{ messages[9].content }}{% endfor", None),
    ):
        template.write_text(text, "utf-8")
        found = keys(plain, tmp_path / f"out-{len(text)}")
        assert found.get("tokenizer.ggml.eot_token_id") == expected
        assert found["tokenizer.chat_template"] == text


def test_several_templates_have_one_order(plain: Path, tmp_path: Path) -> None:
    (plain / "chat_template.jinja").unlink()
    names = ["default", "tool_use", "rag", "a", "b"]
    templates = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in names]
    edit_json(plain / "tokenizer_config.json", chat_template=templates)
    found = keys(plain, tmp_path / "out")
    assert found["tokenizer.chat_template"] == "{{ 'default' }}"
    assert found["tokenizer.chat_templates"] == ["a", "b", "rag", "tool_use"]
    assert found["tokenizer.chat_template.rag"] == "{{ 'rag' }}"


def test_bytes_do_not_depend_on_the_order_of_sets(plain: Path, tmp_path: Path) -> None:
    (plain / "chat_template.jinja").unlink()
    templates = [{"name": name, "template": name} for name in ("one", "two", "three", "four")]
    edit_json(plain / "tokenizer_config.json", chat_template=templates)
    program = (
        "import sys; from pathlib import Path; from tests.gguf.conversions import convert; "
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'Q8_0')"
    )
    written = []
    for seed in ("1", "2"):
        out = tmp_path / f"out-{seed}"
        subprocess.run(
            [sys.executable, "-c", program, str(plain), str(out)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        written.append((out / "model.gguf").read_bytes())
    assert written[0] == written[1]
