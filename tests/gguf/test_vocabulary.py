from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phiconv.errors import CheckpointError
from phiconv.gguf.pre_tokenizer import PRE_TOKENIZERS
from phiconv.gguf.tokenizer_file import read_tokenizer_file
from phiconv.gguf.vocabulary import TokenType, Vocabulary, read_vocabulary
from tests.gguf.sentencepiece_tokenizer import SPACE, sentencepiece_document
from tests.phi3_checkpoints import write_phi3_checkpoint

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_phi3_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")
    document: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return document


@pytest.fixture(scope="module")
def sentencepiece() -> dict[str, Any]:
    return sentencepiece_document()


def read(
    document: dict[str, Any], folder: Path, *, size: int = 352, edit: Edit | None = None
) -> Vocabulary:
    copy = json.loads(json.dumps(document))
    if edit is not None:
        edit(copy)
    (folder / "tokenizer.json").write_text(json.dumps(copy), encoding="utf-8")
    return read_vocabulary(read_tokenizer_file(folder), size)


def add(document: dict[str, Any], text: str, token: int, **flags: bool) -> None:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    document["added_tokens"].append({"id": token, "content": text, **plain, **flags})


def test_byte_level(byte_level: dict[str, Any], tmp_path: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        add(document, "<|looks_special|>", 300)
        add(document, "[plain]", 301)

    found = read(byte_level, tmp_path, edit=edit)
    assert (found.model, found.pre, found.add_space_prefix) == ("gpt2", "gpt-2", None)
    assert found.tokens[0] == "<unk>"
    assert found.types[:8] == (TokenType.CONTROL,) * 8
    assert found.types[8] == TokenType.NORMAL
    assert found.types[300:302] == (TokenType.CONTROL, TokenType.USER_DEFINED)
    assert len(found.tokens) == len(found.types) == 352
    assert (found.tokens[351], found.types[351]) == ("[PAD351]", TokenType.UNUSED)
    assert found.merges[:2] == ("\u0120 t", "h e")
    assert found.scores == ()


def test_sentencepiece(sentencepiece: dict[str, Any], tmp_path: Path) -> None:
    found = read(sentencepiece, tmp_path, size=1000)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    assert found.is_stripping
    assert found.limits == ()
    assert found.merges == ()
    texts = dict(zip(found.tokens, found.types, strict=True))
    assert texts["<0x0A>"] == TokenType.BYTE
    assert texts["<s>"] == texts["<|end|>"] == TokenType.CONTROL
    assert texts["</s>"] == TokenType.USER_DEFINED
    assert found.types[-1] == TokenType.UNUSED
    score = dict(zip(found.tokens, found.scores, strict=True))
    assert score["<|end|>"] == -1000.0
    assert score["[PAD999]"] == -10000.0
    # SentencePiece numbers entries from the first one after the bytes, and scores them by that
    first = 3 + 256
    assert score[found.tokens[first + 1]] == -1.0
    assert score[found.tokens[first + 30]] == -30.0
    assert {score[SPACE * n] for n in (1, 2, 3, 4, 8)} == {-1e9}


def test_no_prefix_is_said(sentencepiece: dict[str, Any], tmp_path: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["normalizer"] = document["normalizer"]["normalizers"][1]

    assert read(sentencepiece, tmp_path, size=1000, edit=edit).add_space_prefix is False


def test_a_prefix_at_the_start_only_is_a_limit(
    sentencepiece: dict[str, Any], tmp_path: Path
) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False,
        }  # fmt: skip

    found = read(sentencepiece, tmp_path, size=1000, edit=edit)
    assert found.add_space_prefix is True
    assert "not also after special tokens" in found.limits[0]


@pytest.mark.parametrize(("expression", "name"), PRE_TOKENIZERS.items())
@pytest.mark.parametrize("way", [("Isolated", False), ("Removed", True)])
def test_pre_tokenizers(
    byte_level: dict[str, Any], tmp_path: Path, expression: str, name: str, way: tuple[str, bool]
) -> None:
    def edit(document: dict[str, Any]) -> None:
        cut = {"type": "Split", "pattern": {"Regex": expression},
               "behavior": way[0], "invert": way[1]}  # fmt: skip
        rest = {**document["pre_tokenizer"], "use_regex": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, rest]}

    def edit_whole(document: dict[str, Any]) -> None:
        edit(document)
        document["model"]["ignore_merges"] = True

    assert read(byte_level, tmp_path, edit=edit).pre == name
    whole = read(byte_level, tmp_path, edit=edit_whole)
    assert whole.pre == "llama-bpe" if name == "dbrx" else whole.limits


def test_strange_pre_tokenizers_are_refused(byte_level: dict[str, Any], tmp_path: Path) -> None:
    def prefix(document: dict[str, Any]) -> None:
        document["pre_tokenizer"]["add_prefix_space"] = True

    def normalizer(document: dict[str, Any]) -> None:
        document["normalizer"] = {"type": "NFC"}

    def expression(document: dict[str, Any]) -> None:
        cut = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"}
        rest = {**document["pre_tokenizer"], "use_regex": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, rest]}

    for edit, named in ((prefix, "ByteLevel"), (normalizer, "NFC"), (expression, "a-z")):
        with pytest.raises(CheckpointError, match="is not known to have") as caught:
            read(byte_level, tmp_path, edit=edit)
        assert named in caught.value.message


def test_stripping_follows_the_added_tokens(byte_level: dict[str, Any], tmp_path: Path) -> None:
    def strip(*names: str) -> Edit:
        def edit(document: dict[str, Any]) -> None:
            for token in document["added_tokens"]:
                token["rstrip"] = token["content"] in names

        return edit

    usual = ("</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    assert not read(byte_level, tmp_path).is_stripping
    found = read(byte_level, tmp_path, edit=strip(*usual))
    assert found.is_stripping
    assert found.limits == ()
    found = read(byte_level, tmp_path, edit=strip("<s>", *usual[:-1]))
    assert found.limits == (
        "white space after '<s>' belongs to it, which llama.cpp does not know",
        "white space after '<|user|>' is kept, but llama.cpp strips it",
    )
    stripped = ("<|assistant|>", "<|end|>", "<|system|>", "<|user|>")  # in the order of their names
    assert read(byte_level, tmp_path, edit=strip("</s>")).limits == tuple(
        f"white space after {text!r} is kept, but llama.cpp strips it" for text in stripped
    )


def test_space_that_belongs_to_the_token_behind_it_is_a_limit(
    byte_level: dict[str, Any], tmp_path: Path
) -> None:
    def edit(document: dict[str, Any]) -> None:
        for token in document["added_tokens"]:
            token["lstrip"] = token["content"] in ("<s>", "<|user|>")

    assert read(byte_level, tmp_path, edit=edit).limits == tuple(
        f"white space before {text!r} belongs to it, which llama.cpp does not know"
        for text in ("<s>", "<|user|>")
    )


def test_a_vocabulary_that_llama_cpp_cannot_load_as_phi_3_is_not_called_so(
    byte_level: dict[str, Any], tmp_path: Path
) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["added_tokens"] = [
            {**token, "rstrip": True} for token in document["added_tokens"] if token["id"] != 2
        ]
        del document["model"]["vocab"]["</s>"]

    found = read(byte_level, tmp_path, edit=edit)
    assert not found.is_stripping
    assert (
        "white space after '<|end|>' belongs to it, which llama.cpp does not know" in found.limits
    )


def test_the_rows_of_the_embedding_bound_the_ids(
    byte_level: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="ids up to 291, the embedding ends at 290"):
        read(byte_level, tmp_path, size=291)


def test_one_text_for_two_ids_is_refused(byte_level: dict[str, Any], tmp_path: Path) -> None:
    # llama.cpp ends the process over such a file
    with pytest.raises(CheckpointError, match="have one text, '<s>'"):
        read(byte_level, tmp_path, edit=lambda document: add(document, "<s>", 300))
    with pytest.raises(CheckpointError, match=r"'\[PAD340\]' stands for an unused id"):
        read(byte_level, tmp_path, edit=lambda document: add(document, "[PAD340]", 300))


def test_missing_merges_are_found(
    byte_level: dict[str, Any], sentencepiece: dict[str, Any], tmp_path: Path
) -> None:
    def lose(document: dict[str, Any]) -> None:
        document["model"]["merges"] = [
            merge for merge in document["model"]["merges"] if merge != ["h", "e"]
        ]

    def misspell(document: dict[str, Any]) -> None:
        document["model"]["merges"][1] = ["h", "q"]

    def lose_one_way(document: dict[str, Any]) -> None:
        merges = [tuple(merge) for merge in document["model"]["merges"]]
        several = [a + b for a, b in merges]
        index = next(i for i, made in enumerate(several) if several.count(made) > 1)
        del document["model"]["merges"][index]

    with pytest.raises(CheckpointError, match="merges are missing: none makes 'he'"):
        read(byte_level, tmp_path, edit=lose)
    with pytest.raises(CheckpointError, match="the merge of 'h' and 'q' needs 'hq'"):
        read(byte_level, tmp_path, edit=misspell)
    with pytest.raises(CheckpointError, match="merges are missing"):
        read(sentencepiece, tmp_path, size=1000, edit=lose_one_way)


def test_both_spellings_of_merges(byte_level: dict[str, Any], tmp_path: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]

    assert read(byte_level, tmp_path, edit=edit) == read(byte_level, tmp_path)


def test_missing_bytes_are_found(sentencepiece: dict[str, Any], tmp_path: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        vocabulary = document["model"]["vocab"]
        vocabulary["<0xZZ>"] = vocabulary.pop("<0x41>")

    with pytest.raises(CheckpointError, match="lack <0x41>"):
        read(sentencepiece, tmp_path, size=1000, edit=edit)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"model": {"type": "BPE", "vocab": {}}}', "not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": [[1, 2]]}}', "not a tokenizer"),
        (
            '{"model": {"type": "Unigram", "vocab": []}, "added_tokens": []}',
            "takes no Unigram model",
        ),
    ],
)
def test_what_is_no_tokenizer(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer_file(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        read_tokenizer_file(tmp_path)
