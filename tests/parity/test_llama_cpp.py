from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phiconv import machine
from phiconv.parity.golden import golden_texts
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.llama_cpp import gguf_parity
from phiconv.parity.llama_cpp_limitations import LlamaCppModel
from phiconv.parity.results import UNEXPLAINED
from tests.gguf.conversions import convert
from tests.gguf.sentencepiece_tokenizer import sentencepiece_document, write_sentencepiece_tokenizer
from tests.phi3_checkpoints import write_phi3_checkpoint

TINY = Path(__file__).parents[2] / "examples" / "tiny-phi3"

pytestmark = pytest.mark.skipif(
    machine.llama_cpp_binding() is None, reason="no package that carries llama.cpp is installed"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "out"
    convert(TINY, out, "Q4_0")
    return out


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece") / "model"
    write_phi3_checkpoint(folder, vocab_size=700, eos_token_id=9, pad_token_id=9)
    write_sentencepiece_tokenizer(folder, sentencepiece_document())
    return folder


def test_the_bundled_checkpoint(tiny: Path) -> None:
    found = gguf_parity(tiny, TINY)
    assert found.tokenizer.texts == len(golden_texts()) >= 200
    assert found.tokenizer.tokens > 3000
    assert found.passed, "\n".join(found.lines())
    # white space that is not ASCII, after special tokens
    assert found.tokenizer.causes == {"encode: ascii_strip": 2}
    assert found.template.conversations == 12
    assert found.template.differences == ()
    assert "llama.cpp" in found.versions


def test_a_sentencepiece_vocabulary(sentencepiece: Path, tmp_path: Path) -> None:
    convert(sentencepiece, tmp_path / "out")
    found = gguf_parity(tmp_path / "out", sentencepiece)
    assert found.passed, "\n".join(found.lines())
    assert set(found.tokenizer.causes) == {"encode: ascii_strip", "stream: end_by_text"}


def test_a_gpt_4o_vocabulary(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model")
    from phiconv.gguf.pre_tokenizer import _O200K

    edit(folder / "tokenizer.json", lambda d: d.update(pre_tokenizer=split(_O200K)))
    convert(folder, tmp_path / "out")
    found = gguf_parity(tmp_path / "out", folder)
    assert found.passed, "\n".join(found.lines())
    assert set(found.tokenizer.causes) <= {"encode: ascii_case"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.pre", b"refact"),  # the same length as gpt-2 and another expression
        ("tokenizer.chat_template", b"{{ 'x' }}"),
    ],
)
def test_planted_faults_are_found(key: str, value: bytes, tmp_path: Path) -> None:
    convert(TINY, tmp_path / "out", "Q4_0")
    file = tmp_path / "out" / "model.gguf"
    rewrite_text(file, key, value)
    found = gguf_parity(tmp_path / "out", TINY)
    assert not found.passed
    if key.endswith("template"):
        assert found.template.failure == "the stored template differs from character 1 on"
    else:
        assert any(cause.endswith(UNEXPLAINED) for cause in found.tokenizer.causes)


def test_a_turn_that_does_not_end_is_an_error(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model")
    convert(folder, tmp_path / "out")
    template = "{% for m in messages %}{{ m.content + '<|user|>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    rewrite_text(tmp_path / "out" / "model.gguf", "tokenizer.chat_template", template.encode())
    found = gguf_parity(tmp_path / "out", folder)
    assert "expected 'stops at <|user|>', found 'goes on'" in "\n".join(found.lines())


def test_a_file_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no")
    found = gguf_parity(tmp_path, TINY)
    assert not found.passed
    assert "does not load" in str(found.tokenizer.failure)


def test_a_limitation_explains_to_the_last_id() -> None:
    model = LlamaCppModel(HuggingFaceTokenizer(TINY))
    text = "<|end|>\u00a0a"
    ids = model.encode(text, ["ascii_strip"])
    assert model.explain(text, ids) == "ascii_strip"
    assert model.explain(text, [*ids, 5]) is None


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text("utf-8"))
    change(document)
    path.write_text(json.dumps(document), "utf-8")


def split(expression: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}
    rest = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [{**cut, "invert": False}, {**rest, "use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def rewrite_text(file: Path, key: str, value: bytes) -> None:
    """Writes the file again with another text under a key."""
    import gguf

    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_suffix(".new"), "phi3")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        content = value.decode() if name == key else field.contents()
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, content, kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)
