"""Chat training samples made of docstrings: questions about an object, its docstring the answer."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from corpus import Document, docstrings, is_test

Message = dict[str, str]

# Real turns only: content stands as it is, the runtime adds nothing. Special tokens of Phi-3 strip
# the white space that follows them, so the line breaks are for the reader.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer questions about Python.")
QUESTIONS = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "How do I use {name}?",
    "What is {name} of Python's standard library?",
)
LONGEST_ANSWER = 800
LONGEST_FUNCTION = 1_200


def render(messages: list[Message]) -> str:
    """Renders a finished conversation as ``CHAT_TEMPLATE`` does."""
    turns = "".join(f"<|{m['role']}|>\n{m['content']}<|end|>\n" for m in messages)
    return f"{turns}<|endoftext|>"


def conversations(documents: list[Document]) -> Iterator[str]:
    """Yields rendered conversations about the documented objects of library modules, in order.

    Every third has a system prompt; every fourth goes on to the module's next object. A function
    that is short enough appears a second time, with its source as the question.
    """
    count = 0
    for document in documents:
        if document.kind != "code" or is_test(document.source):
            continue
        pending: list[Message] = []
        for name, text, node in docstrings(document.text):
            answer = shortened(text)
            question = QUESTIONS[count % len(QUESTIONS)].format(name=object_name(document, name))
            pending += turn(question, answer)
            count += 1
            if count % 4 == 0:
                continue
            yield render(with_system_prompt(pending, count))
            pending = []
            source = undocumented_source(document.text, node)
            if source is not None:
                yield render(turn(f"Write a docstring for this function.\n\n{source}", answer))


def turn(question: str, answer: str) -> list[Message]:
    """A user's question and the assistant's answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def with_system_prompt(messages: list[Message], count: int) -> list[Message]:
    """Puts a system prompt before every third conversation."""
    if count % 3:
        return messages
    content = SYSTEM_PROMPTS[count % len(SYSTEM_PROMPTS)]
    return [{"role": "system", "content": content}, *messages]


def object_name(document: Document, qualified_name: str) -> str:
    """Dotted name of an object: ``json.decoder.JSONDecoder.decode``."""
    module = document.source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"{module}.{qualified_name}" if qualified_name else f"the module {module}"


def shortened(text: str) -> str:
    """A docstring, or its first paragraphs where it is long."""
    kept = ""
    for paragraph in text.strip().split("\n\n"):
        if kept and len(kept) + len(paragraph) > LONGEST_ANSWER:
            break
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    return kept[:LONGEST_ANSWER].rstrip()


def undocumented_source(module: str, node: ast.AST) -> str | None:
    """A function's source without its docstring; None for a class, a module or a long function."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
        return None
    lines = module.split("\n")
    docstring = node.body[0]
    head = lines[node.lineno - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : node.end_lineno]
    source = "\n".join(line[node.col_offset :] for line in (*head, *body))
    return source if len(source) <= LONGEST_FUNCTION else None
