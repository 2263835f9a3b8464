from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from phiconv.checkpoint import Checkpoint
from phiconv.errors import CheckpointError, RecipeError
from phiconv.texts import MAX_BYTES
from phiconv.tokens import Text, load_token_set, read_texts, text_digest
from tests.phi3_checkpoints import write_phi3_checkpoint

TEXTS = ["the cat and the hat\n" * 9, "ein Mädchen, 猫, 🙂 <|end|> and more\n" * 7, "x" * 100]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_phi3_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def texts_file(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    lines = (json.dumps({"source": f"doc{i}", "text": t}) for i, t in enumerate(TEXTS))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def stream(checkpoint: Checkpoint) -> list[int]:
    """All texts as ids with the end-of-text id between them, by the tokenizer itself."""
    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    ids: list[int] = []
    for index, text in enumerate(TEXTS):
        ids += [checkpoint.config.eos_token_ids[0]] if index else []
        ids += tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt"])
def test_what_windows_adds_to_a_text_file_is_no_text(tmp_path: Path, suffix: str) -> None:
    content = {
        "jsonl": '{"text": "one\\ntwo"}\n{"text": "three"}\n',
        "json": '[\n{"text": "one"}\n]\n',
        "txt": "one\ntwo\n",
    }[suffix]
    plain, windows = tmp_path / f"plain.{suffix}", tmp_path / f"windows.{suffix}"
    plain.write_bytes(content.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert text_digest(read_texts(windows)) == text_digest(read_texts(plain))


def test_windows_are_even_chunks_of_the_whole_stream(
    checkpoint: Checkpoint, texts_file: Path
) -> None:
    ids = stream(checkpoint)
    found = load_token_set(texts_file, checkpoint, windows=3, window_length=16)
    chunks = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    expected = [chunks[i * len(chunks) // 3] for i in range(3)]
    assert found.windows.tolist() == expected
    assert found.windows.dtype == np.int64
    assert found.available_tokens == len(ids)
    assert found.name == "texts.jsonl"


def test_all_chunks_together_drop_only_the_last_incomplete_one(
    checkpoint: Checkpoint, texts_file: Path
) -> None:
    ids = stream(checkpoint)
    count = len(ids) // 10
    found = load_token_set(texts_file, checkpoint, windows=count, window_length=10)
    assert found.windows.ravel().tolist() == ids[: count * 10]
    assert found.sources == ("doc0", "doc1", "doc2")


def test_sources_are_those_of_the_windows_alone(checkpoint: Checkpoint, texts_file: Path) -> None:
    found = load_token_set(texts_file, checkpoint, windows=1, window_length=8)
    assert found.sources == ("doc0",)


def test_digests(checkpoint: Checkpoint, texts_file: Path) -> None:
    found = load_token_set(texts_file, checkpoint, windows=2, window_length=8)
    expected = hashlib.sha256()
    for text in TEXTS:
        expected.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert found.text_digest == f"sha256:{expected.hexdigest()}"
    header = (2).to_bytes(8, "little") + (8).to_bytes(8, "little")
    ids = hashlib.sha256(header + found.windows.astype("<i8").tobytes()).hexdigest()
    assert found.ids_digest == f"sha256:{ids}"
    assert text_digest([Text("a", "ab"), Text("b", "c")]) != text_digest(
        [Text("a", "a"), Text("b", "bc")]
    )


def test_the_default_set_is_the_packaged_one(checkpoint: Checkpoint) -> None:
    found = load_token_set("default", checkpoint)
    assert found.windows.shape == (8, 512)
    assert found.name == "default"
    assert len(found.sources) >= 8, "eight windows spread over the texts are of many texts"
    validation, calibration = read_texts("default"), read_texts("default", packaged="calibration")
    assert not {t.text for t in validation} & {t.text for t in calibration}


def test_a_window_starts_with_bos_where_the_tokenizer_puts_one(
    checkpoint: Checkpoint, texts_file: Path, tmp_path: Path
) -> None:
    folder = write_phi3_checkpoint(tmp_path / "bos")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = checkpoint.config.bos_token_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = load_token_set(texts_file, Checkpoint(folder), windows=2, window_length=16)
    assert found.windows[:, 0].tolist() == [bos, bos]
    assert found.windows[0, 1:].tolist() == stream(checkpoint)[:15]
    assert found.available_tokens == len(stream(checkpoint)), "truncation is ignored"


def test_a_plain_text_file_is_one_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text(TEXTS[0], encoding="utf-8")
    found = load_token_set(file, checkpoint, windows=1, window_length=12)
    assert found.sources == ("corpus.txt",)


def test_too_short_a_text_is_an_error_not_a_smaller_measurement(
    checkpoint: Checkpoint, texts_file: Path
) -> None:
    with pytest.raises(RecipeError, match=r"windows of 512, not 8") as caught:
        load_token_set(texts_file, checkpoint)
    assert "fewer or shorter windows" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnot json\n', "line 2"),
        ('{"source": "a"}\n', "string `text`"),
        ("[]\n", "string `text`"),
        ("", "no text"),
        ('{"text": ""}\n', "no text"),
    ],
)
def test_a_broken_texts_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_texts(file)
    assert message in str(caught.value)
    assert "texts.jsonl" in str(caught.value)


def test_a_missing_file_and_a_binary_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_texts(tmp_path / "absent.jsonl")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 from byte 0 on"):
        read_texts(tmp_path / "binary.txt")


def test_a_text_file_that_no_memory_would_hold_tokenized_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(RecipeError, match=r"has 32\.0 MB, more than 32\.0 MB"):
        read_texts(tmp_path / "large.txt")


def test_unicode_line_separators_inside_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert read_texts(file) == [Text("line 1", "a\u2028b")]


def test_a_checkpoint_without_a_tokenizer(texts_file: Path, tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "checkpoint")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_token_set(texts_file, Checkpoint(folder), windows=1, window_length=8)


def test_a_broken_tokenizer_is_named(texts_file: Path, tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "checkpoint")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        load_token_set(texts_file, Checkpoint(folder), windows=1, window_length=8)


def test_a_tokenizer_of_another_model_is_refused(texts_file: Path, tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"extra{i}" for i in range(100)] + ["cat"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="vocabulary ends at 352"):
        load_token_set(texts_file, Checkpoint(folder), windows=3, window_length=16)
