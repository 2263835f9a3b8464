"""Chat template parity: conversations as the runtime writes them, against Hugging Face.

Both render the conversations of the golden set with and without a generation prompt; where the
texts are equal, their ids are compared as those of any golden text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from phiconv.errors import StageError
from phiconv.parity.golden import Conversation, conversations
from phiconv.parity.hugging_face import HuggingFaceTokenizer
from phiconv.parity.results import TemplateDifference, TemplateResult
from phiconv.parity.tokenizer import Comparison, excerpt, first_difference


def template_parity(artifact: Path, checkpoint_path: Path) -> TemplateResult:
    """Compares how an artifact's chat template is rendered with the checkpoint's.

    Args:
        artifact: Folder with genai_config.json and tokenizer files; no weights are read.
        checkpoint_path: Folder of the checkpoint.

    Raises:
        CheckpointError: transformers cannot load the checkpoint's tokenizer.
        EnvironmentLacksError: onnxruntime-genai is not installed.
    """
    reference = HuggingFaceTokenizer(checkpoint_path)
    return compare_templates(Comparison(artifact, reference), reference)


def compare_templates(comparison: Comparison, reference: HuggingFaceTokenizer) -> TemplateResult:
    """The same on tokenizers that are open already.

    A checkpoint without a chat template has nothing to compare. A conversation that its template
    refuses, for example for a system turn, is left out.
    """
    if not reference.has_chat_template:
        return TemplateResult(0)
    if comparison.candidate is None:
        return TemplateResult(0, failure=comparison.failure)
    compared, refused = 0, []
    differences: list[TemplateDifference] = []
    for conversation in conversations():
        texts = [reference.render(conversation.messages, prompt) for prompt in (True, False)]
        if None in texts:
            refused.append(conversation.name)
            continue
        compared += 1
        for prompt, expected in zip((True, False), texts, strict=True):
            assert expected is not None
            differences += _differences(comparison, reference, conversation, prompt, expected)
    differences.sort(key=lambda difference: difference.severity)
    return TemplateResult(compared, tuple(refused), tuple(differences))


def _differences(
    comparison: Comparison,
    reference: HuggingFaceTokenizer,
    conversation: Conversation,
    prompt: bool,
    expected: str,
) -> Iterator[TemplateDifference]:
    assert comparison.candidate is not None
    try:
        found = comparison.candidate.render(conversation.messages, prompt)
    except StageError as error:
        yield TemplateDifference(
            conversation.name, prompt, "error", "failure", 0, excerpt(expected, 0), error.message
        )
        return
    if found != expected:
        index = first_difference(expected, found)
        yield TemplateDifference(
            conversation.name,
            prompt,
            "error",
            "text",
            index,
            excerpt(expected, index),
            excerpt(found, index),
        )
        return
    ids = reference.encode([expected])[0]
    for difference in comparison.encode_differences(conversation.name, expected, ids):
        yield TemplateDifference(
            conversation.name,
            prompt,
            difference.severity,
            difference.cause,
            difference.index,
            str(list(difference.expected)),
            str(list(difference.found)),
        )
