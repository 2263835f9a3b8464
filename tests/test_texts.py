from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.errors import CheckpointError, EnvironmentLacksError, RecipeError
from phiconv.stages.awq import Awq, AwqParams
from phiconv.stages.registry import STAGES
from phiconv.texts import HubFile, hub_file, read_texts, text_digest, texts_key
from phiconv.tokens import load_token_set
from tests.checkpoint.hub_server import COMMIT, Hub, serve
from tests.phi3_checkpoints import write_phi3_checkpoint

SPEC = f"hub:org/texts@{COMMIT}/data/train.jsonl"
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A dataset on a stand-in for the Hub, and an empty cache."""
    from huggingface_hub import constants

    folder = tmp_path / "served"
    (folder / "data").mkdir(parents=True)
    lines = [json.dumps({"text": f"text {index} " * 40}) for index in range(8)]
    (folder / "data" / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "other.txt").write_text("words", encoding="utf-8")
    served = Hub(folder, repo_id="datasets/org/texts")
    with serve(served) as url:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield served


def test_a_dataset_of_the_hub_is_downloaded_once(dataset: Hub) -> None:
    texts = read_texts(SPEC)
    assert [text.source for text in texts[:2]] == ["line 1", "line 2"]
    assert texts[7].text.startswith("text 7")
    assert [text.text for text in read_texts(f"hub:org/texts@{COMMIT}/other.txt")] == ["words"]
    asked = [request for request in dataset.requests if "GET" in request and "/resolve/" in request]
    assert read_texts(SPEC) == texts
    assert [
        request for request in dataset.requests if "GET" in request and "/resolve/" in request
    ] == asked
    assert len(asked) == 2


def test_planning_with_a_dataset_asks_the_hub_nothing(dataset: Hub, tmp_path: Path) -> None:
    params = AwqParams.model_validate(
        {"group_size": 32, "calibration": {"tokens": SPEC}}, context={"folder": tmp_path}
    )
    assert params.calibration.tokens == SPEC
    config = Checkpoint(write_phi3_checkpoint(tmp_path / "model")).config
    assert Awq().check(params, config) == []
    assert Awq().key_params(params)["calibration"]["texts"] == SPEC  # type: ignore[index,call-overload]
    assert texts_key(SPEC, "calibration") == SPEC
    assert not any("/resolve/" in request for request in dataset.requests)


@pytest.mark.parametrize("name", ["reference", "imatrix", "length-reference"])
def test_keys_of_a_dataset_ask_the_hub_nothing(name: str, dataset: Hub) -> None:
    stage = STAGES[name]
    params = stage.params.model_validate({"tokens": SPEC})
    assert stage.key_params(params)["text_digest"] == SPEC
    assert not any("/resolve/" in request for request in dataset.requests)


def test_a_dataset_makes_a_token_set(dataset: Hub, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_phi3_checkpoint(tmp_path / "model"))
    tokens = load_token_set(SPEC, checkpoint, windows=2, window_length=32)
    assert tokens.name == "train.jsonl"
    assert tokens.text_digest == text_digest(read_texts(SPEC))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hub:org/texts", "not a file of a dataset at a commit"),
        ("hub:org/texts@main/train.jsonl", "not a file of a dataset at a commit"),
        (f"hub:org/texts@{COMMIT}/train.parquet", r"train\.parquet is no \.jsonl"),
        (f"hub:org/texts@{COMMIT}/../x.txt", r"x\.txt is no \.jsonl"),
    ],
)
def test_what_is_no_pinned_file_is_refused(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        hub_file(spec)


def test_specs_of_the_hub_are_told_from_files() -> None:
    assert hub_file("hub.txt") is None
    assert hub_file(SPEC) == HubFile("org/texts", COMMIT, "data/train.jsonl")


def test_a_file_that_the_dataset_lacks(dataset: Hub) -> None:
    with pytest.raises(EnvironmentLacksError, match=r"no file absent\.txt"):
        read_texts(f"hub:org/texts@{COMMIT}/absent.txt")


def test_a_json_file_is_a_list_of_records(tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": "a", "source": "one"}, TALK]), encoding="utf-8")
    first, second = read_texts(path)
    assert (first.source, first.text, first.messages) == ("one", "a", None)
    assert second.source == "record 2"
    assert second.messages == (("user", "Hi"), ("assistant", "Ho"))
    for bad in ("{", '{"text": "a"}', '[{"texts": "a"}]', '[{"messages": [{"role": "user"}]}]'):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(RecipeError, match="JSON"):
            read_texts(path)


def decoded(checkpoint: Checkpoint, ids: object) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.path / "tokenizer.json"))
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text


def test_texts_and_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_phi3_checkpoint(tmp_path / "model"))
    path = tmp_path / "talk.jsonl"
    lines = [json.dumps({"text": "plain"}), json.dumps(TALK)]
    path.write_text("\n".join(lines), encoding="utf-8")
    tokens = load_token_set(path, checkpoint, windows=1, window_length=16, chat=True)
    text = decoded(checkpoint, tokens.windows[0].tolist())
    assert text.startswith("<|user|>\nplain<|end|>\n<|endoftext|><|user|>\nHi<|end|>\n")
    with pytest.raises(RecipeError, match="conversations among the texts"):
        load_token_set(path, checkpoint, windows=1, window_length=16)


def test_a_checkpoint_without_a_chat_template_is_named(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        load_token_set("default", Checkpoint(folder), windows=1, window_length=16, chat=True)


def test_long_texts_are_cut_never_dropped(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_phi3_checkpoint(tmp_path / "model"))
    path = tmp_path / "long.txt"
    path.write_text("word and word, " * 400, encoding="utf-8")
    one = load_token_set(path, checkpoint, windows=1, window_length=32, chat=True)
    windows = one.available_tokens // 32
    whole = load_token_set(path, checkpoint, windows=windows, window_length=32, chat=True)
    assert decoded(checkpoint, whole.windows.reshape(-1).tolist()).count("word") > 780


@pytest.mark.parametrize(
    "record",
    ['{"text": "a\\ud800b"}', '{"messages": [{"role": "user", "content": "\\udc00"}]}'],
)
def test_half_a_character_is_refused_with_its_line(record: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "whole: \\ud83d\\ude00"}}\n{record}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="which is no character") as caught:
        read_texts(path)
    assert (caught.value.where or "").endswith("texts.jsonl, line 2")
