"""The committed checkpoint and texts are what their READMEs say, and fit every runtime."""

from __future__ import annotations

import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from chat_samples import CHAT_TEMPLATE, conversations
from corpus import (
    Corpus,
    Document,
    collect,
    docstrings,
    file_digest,
    passages,
    repeats,
    standard_library_files,
)
from held_out_perplexity import by_kind

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "tiny-phi3"
DATA = ROOT / "phiconv" / "data"

GOLDEN = (
    "",
    " ",
    "   ",
    "\n",
    "Hello world",
    "  two leading spaces and trailing   ",
    "    def f(x):\n        return x**2\n\n\n    # done\n",
    "tab\tseparated\r\nWindows line",
    "_private __dunder__ snake_case_name CamelCase",
    "x = [1, 2.5e-10, 0xFF]; y = {'a': \"b\"}",
    "it's I'm WE'LL they've don't",
    "1234567890",
    "café naïve Ünïcödé ß e\u0301",
    "中文字符测试。日本語テスト",
    "🙂🙃👩\u200d👩\u200d👧",
    "العربية हिन्दी",
    "\u00a0non-breaking\u2003em\u2028line\x0bvertical\x0cfeed",
    "¼²③",
    "a<|endoftext|> b<|endoftext|>\nc",
    "<s>x</s>  y<unk> z",
    "<|user|>   Hi  <|end|>   \n\n x",
    "<|user| <|nope|> |>",
    "<|system|>\nBe brief.<|end|>\n<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\n",
)
CONVERSATION = [
    {"role": "system", "content": "You answer questions about Python."},
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "Serialize ``obj`` to a JSON formatted ``str``."},
    {"role": "user", "content": "And json.loads?"},
]


def config() -> dict[str, Any]:
    """The checkpoint's config.json."""
    parsed: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    return parsed


def records(name: str) -> list[Document]:
    """A held-out split as committed."""
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Document(r["source"], "code", r["text"]) for r in map(json.loads, lines)]


def table(path: Path) -> dict[str, list[str]]:
    """Rows of a README's tables by their first cell."""
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The running Python's texts."""
    return collect()


@pytest.fixture(scope="module")
def hf_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def og_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """onnxruntime-genai's tokenizer over the same files and a genai_config.json of the shape."""
    og = pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("og")
    for path in (*CHECKPOINT.glob("tokenizer*"), *CHECKPOINT.glob("chat_template*")):
        shutil.copy(path, folder)
    shape = config()
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text(encoding="utf-8"))
    decoder = {
        "filename": "model.onnx",
        "head_size": shape["hidden_size"] // shape["num_attention_heads"],
        "hidden_size": shape["hidden_size"],
        "num_attention_heads": shape["num_attention_heads"],
        "num_hidden_layers": shape["num_hidden_layers"],
        "num_key_value_heads": shape["num_key_value_heads"],
        "session_options": {"provider_options": []},
    }
    model = {
        "type": "phi3",
        "context_length": shape["max_position_embeddings"],
        "vocab_size": shape["vocab_size"],
        "decoder": decoder,
        **{f"{name}_token_id": generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")},
    }
    text = json.dumps({"model": model, "search": {"max_length": 16}})
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    return og.Tokenizer(og.Config(str(folder)))


def test_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 16 * 2**20


def test_weights_are_bf16_and_finite() -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(CHECKPOINT / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert config()["dtype"] == "bfloat16"
    assert config()["architectures"] == ["Phi3ForCausalLM"]


def test_vocabulary_is_no_other_width() -> None:
    from safetensors import safe_open

    vocabulary = config()["vocab_size"]
    with safe_open(CHECKPOINT / "model.safetensors", "np") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            shape = weights.get_slice(name).get_shape()
            if name in ("lm_head.weight", "model.embed_tokens.weight"):
                assert shape == [vocabulary, config()["hidden_size"]]
            else:
                assert vocabulary not in shape, name
    # Halves and thirds of the fused projections are widths too, once they are split.
    assert vocabulary not in [config()["hidden_size"] * 3, config()["intermediate_size"] * 2]
    assert vocabulary not in [config()["max_position_embeddings"], config()["intermediate_size"]]


def test_hidden_size_suits_k_quants() -> None:
    assert config()["hidden_size"] % 256 == 0
    assert config()["intermediate_size"] % 256 == 0


def test_special_tokens(hf_tokenizer: Any) -> None:
    ids = hf_tokenizer.convert_tokens_to_ids
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [ids("<|endoftext|>"), ids("<|end|>")]
    assert config()["eos_token_id"] == ids("<|endoftext|>") == hf_tokenizer.eos_token_id
    assert config()["bos_token_id"] == ids("<s>") == hf_tokenizer.bos_token_id
    assert [ids(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert len(hf_tokenizer) < config()["vocab_size"]


@pytest.mark.parametrize("text", GOLDEN, ids=ascii)
def test_tokenizers_agree(hf_tokenizer: Any, og_tokenizer: Any, text: str) -> None:
    ids = hf_tokenizer.encode(text)
    assert ids == [int(token) for token in og_tokenizer.encode(text)]
    assert 0 not in ids or "<unk>" in text
    if "<" not in text:
        assert hf_tokenizer.decode(ids) == text


def test_tokenizers_agree_on_validation_texts(hf_tokenizer: Any, og_tokenizer: Any) -> None:
    for document in records("validation"):
        ids = [int(token) for token in og_tokenizer.encode(document.text)]
        assert hf_tokenizer.encode(document.text) == ids, document.source


@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template(hf_tokenizer: Any, og_tokenizer: Any, prompt: bool) -> None:
    text = hf_tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=prompt
    )
    turns = "".join(f"<|{turn['role']}|>\n{turn['content']}<|end|>\n" for turn in CONVERSATION)
    assert text == turns + ("<|assistant|>\n" if prompt else "<|endoftext|>")
    assert text == og_tokenizer.apply_chat_template(
        json.dumps(CONVERSATION), add_generation_prompt=prompt
    )
    assert hf_tokenizer.chat_template == CHAT_TEMPLATE


def test_training_conversations_follow_the_template(hf_tokenizer: Any) -> None:
    source = '"""A module."""\n\ndef f(x):\n    """Returns x."""\n    return x\n'
    first, second, third = conversations([Document("a/b.py", "code", source)])
    question = [{"role": "user", "content": "What does the module a.b do?"}]
    answer = [{"role": "assistant", "content": "A module."}]
    assert first == hf_tokenizer.apply_chat_template(question + answer, tokenize=False)
    assert "a.b.f" in second
    assert "def f(x):\n    return x" in third
    assert third.endswith("<|assistant|>\nReturns x.<|end|>\n<|endoftext|>")


def test_held_out_perplexity_is_the_readme_s() -> None:
    stated = {row: float(cells[0]) for row, cells in perplexity_rows().items()}
    assert stated["all"] <= 40
    measured = by_kind(CHECKPOINT, DATA / "validation.jsonl", kinds=("topic",))
    assert measured["topic"].value <= 40
    # Stated to three decimals; threads and kernels move the last.
    assert measured["topic"].value == pytest.approx(stated["topic"], rel=1e-3)
    assert measured["topic"].tokens == int(perplexity_rows()["topic"][1].replace(",", ""))


def perplexity_rows() -> dict[str, list[str]]:
    """The model card's perplexities: text, then (perplexity, predicted tokens)."""
    rows = table(CHECKPOINT / "README.md")
    return {kind: rows[kind] for kind in ("code", "docstrings", "topic", "all")}


@pytest.mark.parametrize("name", ["calibration", "validation"])
def test_readme_digests(name: str) -> None:
    path = DATA / f"{name}.jsonl"
    documents, characters, *_, digest = table(DATA / "README.md")[path.name]
    assert digest == file_digest(path)
    assert int(documents) == len(records(name))
    assert int(characters.replace(",", "")) == sum(len(d.text) for d in records(name))


def test_held_out_splits_are_disjoint() -> None:
    calibration, validation = records("calibration"), records("validation")
    assert not {d.file for d in calibration} & {d.file for d in validation}
    seen = {line for document in validation for line in passages(document.text)}
    assert [d.source for d in calibration if repeats(d.text, seen)] == []


def test_training_text_is_disjoint_from_held_out_text(corpus: Corpus) -> None:
    held_out = [*corpus.calibration, *corpus.validation]
    assert not {d.file for d in corpus.train} & {d.file for d in held_out}
    seen = {line for document in held_out for line in passages(document.text)}
    assert [d.source for d in corpus.train if repeats(d.text, seen)] == []
    # Names are the library's own: nothing tells where Python is installed.
    assert not any(re.match(r"(/|[A-Z]:|\.\.)", d.source) for d in (*corpus.train, *held_out))


def test_committed_texts_are_what_the_command_makes(corpus: Corpus) -> None:
    made_under = re.search(r"Python (\d+\.\d+\.\d+)", (DATA / "README.md").read_text("utf-8"))
    assert made_under is not None
    if platform.python_version() != made_under[1]:
        pytest.skip(f"the texts are those of Python {made_under[1]}")
    present = {name for name, _ in standard_library_files()}
    committed = {name: records(name) for name in ("calibration", "validation")}
    files = {d.file for split in committed.values() for d in split}
    if missing := {file for file in files if not file.startswith("topic:")} - present:
        pytest.skip(f"this Python ships without {sorted(missing)}")
    for name, documents in committed.items():
        made = [(d.source, d.text) for d in getattr(corpus, name)]
        assert made == [(d.source, d.text) for d in documents]


def test_docstrings_are_named_in_order() -> None:
    source = (
        '"""M."""\nclass A:\n    """A."""\n    def f(self):\n        """F."""\n'
        'async def g():\n    """G."""\ndef undocumented(): ...\n'
    )
    named = [(name, text) for name, text, _ in docstrings(source)]
    assert named == [("", "M."), ("A", "A."), ("A.f", "F."), ("g", "G.")]
    assert list(docstrings("def broken(:")) == []
