"""Tokenizer files ship so that GenAI and transformers read what the publisher means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.errors import CheckpointError
from phiconv.onnx.tokenizer_files import ShippedTokenizer, write_tokenizer_files
from phiconv.parity.genai import GenAITokenizer
from phiconv.parity.golden import golden_texts
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from tests.parity.tokenizers import write_tokenizer_pair
from tests.phi3_checkpoints import write_phi3_checkpoint

ROOT = Path(__file__).parents[2]
TEXTS = [text.text for text in golden_texts()]
MESSAGES = [{"role": "user", "content": "hi"}]
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
OTHER_TEMPLATE = "{% for message in messages %}other{% endfor %}"
# As the published models have it: Phi-3's is a SentencePiece one, Phi-4's is byte-level.
CLASSES = {"phi-3": "LlamaTokenizer", "phi-4": "GPT2Tokenizer"}

Document = dict[str, Any]
Edit = Callable[[Document, Document, Document], None]


class Published:
    """A checkpoint in the layout of the published ones: inline template, added_tokens_decoder."""

    def __init__(self, kind: str, source: Path, artifact: Path, weights: Path):
        self.kind = kind
        self._artifact = artifact
        self._weights = weights
        self.tokenizer: Document = json.loads((source / "tokenizer.json").read_text("utf-8"))
        named = {"bos_token": "<s>", "unk_token": "<unk>"} if kind == "phi-3" else {}
        self.config: Document = {
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in self.tokenizer["added_tokens"]
            },
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "model_max_length": 10**30,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": CLASSES[kind],
            **named,
        }

    def checkpoint(self, folder: Path, edit: Edit | None = None) -> Checkpoint:
        """The checkpoint, after `edit` of tokenizer, config and other files by name."""
        shutil.copytree(self._weights, folder)
        tokenizer, config = (json.loads(json.dumps(x)) for x in (self.tokenizer, self.config))
        files: Document = {}
        if edit is not None:
            edit(tokenizer, config, files)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).unlink()
        for name, content in {
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": config,
            **files,
        }.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        return Checkpoint(folder)

    def ship(self, checkpoint: Checkpoint, folder: Path) -> ShippedTokenizer:
        folder.mkdir()
        shutil.copy(self._artifact / "genai_config.json", folder)
        return write_tokenizer_files(checkpoint, folder)


@pytest.fixture(scope="module", params=CLASSES)
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    folder = tmp_path_factory.mktemp("published")
    source, artifact = write_tokenizer_pair(request.param, folder / "tokenizer")
    weights = write_phi3_checkpoint(folder / "weights", vocab_size=1600, num_hidden_layers=1)
    return Published(request.param, source, artifact, weights)


def other_flags(tokenizer: Document, config: Document, files: Document) -> None:
    for token in config["added_tokens_decoder"].values():
        if token["content"] == "<|endoftext|>":
            token["rstrip"] = True


def flags_left_out(tokenizer: Document, config: Document, files: Document) -> None:
    for token in config["added_tokens_decoder"].values():
        for flag in ("normalized", "lstrip", "rstrip", "single_word"):
            if token[flag] is False:
                del token[flag]


def missing_token(tokenizer: Document, config: Document, files: Document) -> None:
    tokenizer["added_tokens"].pop()


def no_list(tokenizer: Document, config: Document, files: Document) -> None:
    del config["added_tokens_decoder"]


def new_pad(tokenizer: Document, config: Document, files: Document) -> None:
    config["pad_token"] = "[PAD]"


def tokens_without_role(tokenizer: Document, config: Document, files: Document) -> None:
    config |= {"additional_special_tokens": ["<|x|>"], "image_token": "<|image|>"}
    config["add_bos_token"] = False


def old_files(tokenizer: Document, config: Document, files: Document) -> None:
    """As transformers 4 wrote them before added_tokens_decoder."""
    del config["added_tokens_decoder"]
    end = {"content": "<|turn|>", "rstrip": True, "lstrip": False, "normalized": False}
    files["special_tokens_map.json"] = {"eos_token": {**end, "single_word": False}}
    files["added_tokens.json"] = {"<|plain|>": 1500, "<|endoftext|>": 3}


def old_files_beside_a_list(tokenizer: Document, config: Document, files: Document) -> None:
    files["special_tokens_map.json"] = {"eos_token": "<|other|>"}


EDITS: tuple[Edit | None, ...] = (
    None,
    other_flags,
    missing_token,
    no_list,
    new_pad,
    tokens_without_role,
    old_files,
    old_files_beside_a_list,
)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: getattr(edit, "__name__", "published"))
def test_genai_reads_what_transformers_makes_of_the_checkpoint(
    published: Published, edit: Edit | None, tmp_path: Path
) -> None:
    checkpoint = published.checkpoint(tmp_path / "checkpoint", edit)
    shipped = published.ship(checkpoint, tmp_path / "ours")
    reference = HuggingFaceTokenizer(checkpoint.path)
    saved = tmp_path / "saved"
    reference._tokenizer.save_pretrained(saved)
    shutil.copy(tmp_path / "ours" / "genai_config.json", saved)

    document = json.loads((tmp_path / "ours" / "tokenizer.json").read_text("utf-8"))
    assert document["added_tokens"] == reference.document["added_tokens"]
    assert document["model"]["vocab"] == reference.document["model"]["vocab"]
    ours = HuggingFaceTokenizer(tmp_path / "ours")
    assert ours.document == reference.document
    assert ours.encode(TEXTS) == reference.encode(TEXTS)
    assert encoded(tmp_path / "ours") == encoded(saved)
    assert shipped.ids == reference._tokenizer.get_vocab()
    kinds = reference.special_token_ids
    assert {kind: shipped.special_id(kind) for kind in kinds} == dict(kinds)


def encoded(folder: Path) -> list[list[int]]:
    tokenizer = GenAITokenizer(folder)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("edit", [None, no_list, old_files_beside_a_list, flags_left_out])
def test_files_that_need_no_change_are_the_publishers(
    published: Published, edit: Edit | None, tmp_path: Path
) -> None:
    checkpoint = published.checkpoint(tmp_path / "checkpoint", edit)
    published.ship(checkpoint, tmp_path / "ours")
    names = {"tokenizer.json", *{"special_tokens_map.json"}.intersection(checkpoint.files)}
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (checkpoint.path / name).read_bytes()
    shipped = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text("utf-8"))
    stored = json.loads((checkpoint.path / "tokenizer_config.json").read_text("utf-8"))
    assert stored.pop("chat_template") == TEMPLATE
    changed = {"model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert shipped == stored | changed


def inline(tokenizer: Document, config: Document, files: Document) -> None:
    pass


def in_a_file(tokenizer: Document, config: Document, files: Document) -> None:
    files["chat_template.jinja"] = config.pop("chat_template")


def in_both(tokenizer: Document, config: Document, files: Document) -> None:
    files["chat_template.jinja"] = TEMPLATE
    config["chat_template"] = OTHER_TEMPLATE


def by_name(tokenizer: Document, config: Document, files: Document) -> None:
    config["chat_template"] = [
        {"name": "tool_use", "template": OTHER_TEMPLATE},
        {"name": "default", "template": TEMPLATE},
    ]


@pytest.mark.parametrize("edit", [inline, in_a_file, in_both, by_name])
def test_the_chat_template_is_the_one_that_transformers_uses(
    published: Published, edit: Edit, tmp_path: Path
) -> None:
    checkpoint = published.checkpoint(tmp_path / "checkpoint", edit)
    published.ship(checkpoint, tmp_path / "ours")
    reference = HuggingFaceTokenizer(checkpoint.path)
    expected = reference.render(MESSAGES, False)
    assert expected == "<|user|>hi"
    assert GenAITokenizer(tmp_path / "ours").render(MESSAGES, False) == expected
    assert HuggingFaceTokenizer(tmp_path / "ours").chat_template == reference.chat_template


def test_what_genai_itself_would_do_with_the_publishers_files(
    published: Published, tmp_path: Path
) -> None:
    """Why they are put straight; what no longer fails here need not be changed any more."""

    def as_published(edit: Edit) -> GenAITokenizer:
        folder = published.checkpoint(tmp_path / edit.__name__, edit).path
        shutil.copy(published._artifact / "genai_config.json", folder)
        return GenAITokenizer(folder)

    def unknown_class(tokenizer: Document, config: Document, files: Document) -> None:
        config["tokenizer_class"] = "Phi5Tokenizer"

    def no_config(tokenizer: Document, config: Document, files: Document) -> None:
        config.clear()

    assert as_published(in_both).render(MESSAGES, False) == "other"
    with pytest.raises(Exception, match="must be string, but is array"):
        as_published(by_name).render(MESSAGES, False)
    with pytest.raises(Exception, match="Unsupported tokenizer class"):
        as_published(unknown_class)
    folder = tmp_path / "ours"
    published.ship(published.checkpoint(tmp_path / "unknown", unknown_class), folder)
    assert GenAITokenizer(folder).encode("hi")


def test_a_llama_class_makes_genai_take_byte_level_entries_for_sentencepiece(
    tmp_path: Path,
) -> None:
    """As the files of Phi-4, if they named such a class."""
    checkpoint = Checkpoint(ROOT / "examples" / "tiny-phi3")
    write_tokenizer_files(checkpoint, tmp_path)
    genai = {"type": "phi3", "context_length": 512, "vocab_size": 3520, "decoder": {}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": genai}))
    expected = HuggingFaceTokenizer(checkpoint.path).encode(TEXTS)
    wrong = [ours != theirs for ours, theirs in zip(encoded(tmp_path), expected, strict=True)]
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("PreTrainedTokenizerFast", "LlamaTokenizer"))
    as_llama = [ours != theirs for ours, theirs in zip(encoded(tmp_path), expected, strict=True)]
    assert sum(as_llama) > 3 * sum(wrong)


@pytest.mark.parametrize("name", ["tiny-phi3", "tiny-phi4-mini"])
def test_files_of_the_bundled_checkpoints_are_shipped_as_they_are(
    name: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint(ROOT / "examples" / name)
    write_tokenizer_files(checkpoint, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / file).read_bytes() == (checkpoint.path / file).read_bytes()
    stored = (checkpoint.path / "tokenizer_config.json").read_text("utf-8")
    expected = stored.replace("GPT2Tokenizer", "PreTrainedTokenizerFast")
    assert (tmp_path / "tokenizer_config.json").read_text("utf-8") == expected


def test_without_tokenizer_config_genai_gets_one(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint")
    (path / "tokenizer_config.json").unlink()
    (tmp_path / "ours").mkdir()
    write_tokenizer_files(Checkpoint(path), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text()) == {
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_without_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint")
    (path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as caught:
        write_tokenizer_files(Checkpoint(path), tmp_path)
    assert caught.value.remedy is not None
    assert "save_pretrained" in caught.value.remedy


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "not valid JSON"),
        ("tokenizer.json", "{}", "not a tokenizer: KeyError"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"vocab": []}}', "not a tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "not a tokenizer"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "not a tokenizer"),
        ("special_tokens_map.json", "[]", "must hold a JSON object"),
        # only what is to be changed is read by the library
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"vocab": {"a": 0}, "merges": [["a", 7]]}}',
            "not a tokenizer",
        ),
    ],
)
def test_broken_files_are_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint")
    (path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        write_tokenizer_files(Checkpoint(path), tmp_path)
    assert caught.value.where is not None
    assert caught.value.where.startswith(str(path))
