from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from phiconv.parity.chat_template import template_parity
from phiconv.parity.golden import conversations
from tests.parity.conftest import Broken
from tests.parity.tokenizers import KINDS
from tests.phi3_checkpoints import CHAT_TEMPLATE

# Phi-4's published turns: no line ends, so white space of a turn stands beside control tokens.
PHI4_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def test_clean_artifact_renders_every_conversation(artifact: Path, checkpoint_path: Path) -> None:
    result = template_parity(artifact, checkpoint_path)
    assert result.conversations == len(conversations())
    assert result.refused == ()
    assert result.differences == ()
    assert result.error_count == 0


def test_changed_template_is_named(broken: Broken, checkpoint_path: Path) -> None:
    template = CHAT_TEMPLATE.replace("<|end|>\\n", "<|end|>")
    (broken.path / "chat_template.jinja").write_text(template, encoding="utf-8")
    result = template_parity(broken.path, checkpoint_path)
    assert result.error_count == 2 * len(conversations())
    first = result.differences[0]
    assert first.conversation == "single_turn"
    assert first.cause == "text"
    assert first.index == len("<|user|>\nHi there!<|end|>")
    assert first.expected.startswith("|>\n")
    assert first.found == "|><|assistant|>\n"
    assert "conversation single_turn with generation prompt" in str(first)


def test_generation_prompt_of_the_template_is_compared(
    broken: Broken, checkpoint_path: Path
) -> None:
    template = CHAT_TEMPLATE.replace("if add_generation_prompt", "if false")
    (broken.path / "chat_template.jinja").write_text(template, encoding="utf-8")
    result = template_parity(broken.path, checkpoint_path)
    assert {difference.add_generation_prompt for difference in result.differences} == {True}


def test_missing_template_is_an_error(broken: Broken, checkpoint_path: Path) -> None:
    (broken.path / "chat_template.jinja").unlink()
    result = template_parity(broken.path, checkpoint_path)
    assert result.error_count == 2 * len(conversations())
    assert {difference.cause for difference in result.differences} <= {"failure", "text"}


def test_ids_of_equal_texts_are_compared(broken: Broken, checkpoint_path: Path) -> None:
    result = template_parity(
        broken.edit("tokenizer.json", lambda t: t["model"]["merges"].pop(0)), checkpoint_path
    )
    assert result.error_count > 0
    assert {difference.cause for difference in result.differences} == {"artifact"}


def test_template_that_refuses_system_turns_is_no_fault(
    artifact: Path, checkpoint_path: Path, tmp_path: Path
) -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    folders = []
    for name, source in (("checkpoint", checkpoint_path), ("artifact", artifact)):
        ignore = shutil.ignore_patterns("model*")
        folder = shutil.copytree(source, tmp_path / name, ignore=ignore)
        (folder / "chat_template.jinja").write_text(refusing + CHAT_TEMPLATE, encoding="utf-8")
        folders.append(folder)
    result = template_parity(folders[1], folders[0])
    assert set(result.refused) == {"system", "multi_turn", "system_only"}
    assert result.conversations == len(conversations()) - 3
    assert result.error_count == 0


def test_checkpoint_without_template_has_nothing_to_compare(
    artifact: Path, checkpoint_path: Path, tmp_path: Path
) -> None:
    ignore = shutil.ignore_patterns("model*", "chat_template.jinja")
    folder = shutil.copytree(checkpoint_path, tmp_path / "checkpoint", ignore=ignore)
    result = template_parity(artifact, folder)
    assert (result.conversations, result.error_count) == (0, 0)


def test_tokenizer_that_does_not_load_is_one_error(broken: Broken, checkpoint_path: Path) -> None:
    (broken.path / "tokenizer.json").unlink()
    result = template_parity(broken.path, checkpoint_path)
    assert result.failure is not None
    assert result.error_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_published_pipelines(kind: str, tokenizer_pairs: dict[str, tuple[Path, Path]]) -> None:
    checkpoint, artifact = tokenizer_pairs[kind]
    for folder in (checkpoint, artifact):
        template = PHI4_TEMPLATE if kind == "phi-4" else CHAT_TEMPLATE
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    result = template_parity(artifact, checkpoint)
    assert result.conversations == len(conversations())
    assert result.error_count == 0, [str(difference) for difference in result.differences]
    if kind == "phi-4":
        # the runtime keeps the white space before <|im_end|>, which Hugging Face takes away
        named = {difference.conversation for difference in result.differences}
        assert named == {"surrounding_whitespace"}
        assert {d.cause for d in result.differences} == {"strips_ascii_space_only"}
