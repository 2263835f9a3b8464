"""Faults in what lies beside the graph: genai_config.json, the tokenizer's files, the data file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.faults.planting import Site, Truth
from benchmarks.faults.stored import MODEL

FolderFault = Callable[[Site], Truth | None]
GENAI, TOKENIZER = "genai_config.json", "tokenizer.json"
TEMPLATE = "chat_template.jinja"
_PAGE = 4096


def _edit(file: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def setting(path: str, *choices: Callable[[Any], Any]) -> FolderFault:
    """One key of genai_config.json has another value."""
    *parents, last = path.split(".")

    def plant(site: Site) -> Truth:
        choice = site.random.choice(choices)
        said = []

        def change(document: Any) -> None:
            for name in parents:
                document = document[name]
            said.append(f"{path}: {document.get(last)!r} becomes")
            document[last] = choice(document.get(last))
            said.append(repr(document[last]))

        _edit(site.path / GENAI, change)
        return Truth(" ".join(said), words=(last,))

    return plant


def dropped_merge(site: Site) -> Truth:
    """One merge is missing from tokenizer.json."""
    said = []

    def change(document: Any) -> None:
        merges = document["model"]["merges"]
        index = site.random.randrange(len(merges))
        said.append(f"merge {index} {merges.pop(index)!r} is missing")

    _edit(site.path / TOKENIZER, change)
    return Truth(said[0], words=("merge", "token", "encode"))


def swapped_entries(site: Site) -> Truth:
    """Two entries of the vocabulary have each other's ids."""
    said = []

    def change(document: Any) -> None:
        vocabulary = document["model"]["vocab"]
        added = {token["content"] for token in document["added_tokens"]}
        names = sorted(set(vocabulary) - added)
        one, two = site.random.sample(names, 2)
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
        said.append(f"ids of {one!r} and {two!r} are exchanged")

    _edit(site.path / TOKENIZER, change)
    return Truth(said[0], words=("vocabulary", "token", "encode", "decode"))


def special_id_off(site: Site) -> Truth:
    """Two special tokens have each other's ids."""
    said = []

    def change(document: Any) -> None:
        tokens = document["added_tokens"]
        one, two = site.random.sample(tokens, 2)
        one["content"], two["content"] = two["content"], one["content"]
        said.append(f"{one['content']!r} and {two['content']!r} are exchanged")

    _edit(site.path / TOKENIZER, change)
    return Truth(said[0], words=("added token", "special", "token"))


def special_flag(site: Site) -> Truth:
    """A flag of an added token is another."""
    said = []

    def change(document: Any) -> None:
        token = site.random.choice(document["added_tokens"])
        flag = site.random.choice(("special", "rstrip", "lstrip"))
        token[flag] = not token[flag]
        said.append(f"{flag} of {token['content']!r} is {token[flag]}")

    _edit(site.path / TOKENIZER, change)
    return Truth(said[0], words=("added token", "special", "strip"))


def template_changed(site: Site) -> Truth:
    """The chat template writes turns otherwise."""
    file = site.path / TEMPLATE
    text = file.read_text(encoding="utf-8")
    changes = (("<|end|>", "<|endoftext|>"), ("\\n", " "), ("|>", ">"), ("<|", "<| "))
    old, new = site.random.choice([change for change in changes if change[0] in text])
    file.write_text(text.replace(old, new), encoding="utf-8")
    return Truth(f"{old!r} is {new!r} in the template", words=("template", "conversation", "turn"))


def stale_data(site: Site) -> Truth | None:
    """The external data is that of a build of the same model, trained a little further."""
    mine, its = site.path / f"{MODEL}.data", site.later / f"{MODEL}.data"
    if not its.is_file() or mine.stat().st_size != its.stat().st_size:
        return None
    shutil.copyfile(its, mine)
    return Truth("model.onnx.data of another build", ("*",))


def zeroed_page(site: Site) -> Truth:
    """A page of the data file is zero, as after a copy that was broken off."""
    file = site.path / f"{MODEL}.data"
    page = site.random.randrange(file.stat().st_size // _PAGE)
    with file.open("r+b") as data:
        data.seek(page * _PAGE)
        was_zero = not any(data.read(_PAGE))
        data.seek(page * _PAGE)
        data.write(bytes(_PAGE))
    what = f"page {page} of model.onnx.data is zero"
    return Truth(what, () if was_zero else ("*",), words=("weight",))


def truncated(site: Site) -> Truth:
    """A file ends early."""
    name = site.random.choice((f"{MODEL}.data", MODEL))
    file = site.path / name
    size = file.stat().st_size
    keep = size - site.random.choice((1, _PAGE, size // 3))
    with file.open("r+b") as data:
        data.truncate(keep)
    return Truth(f"{name} ends after {keep} of {size} bytes", words=(name,))


FOLDER_FAULTS: Mapping[str, FolderFault] = {
    "genai_config: eos": setting(
        "model.eos_token_id", lambda found: found[:1], lambda _: 2, lambda found: [*found, 17]
    ),
    "genai_config: head_size": setting("model.decoder.head_size", lambda found: found // 2),
    "genai_config: key/value heads": setting(
        "model.decoder.num_key_value_heads", lambda found: found * 2, lambda found: found // 2
    ),
    "genai_config: layers": setting("model.decoder.num_hidden_layers", lambda found: found - 1),
    "genai_config: context_length": setting("model.context_length", lambda found: found * 32),
    "genai_config: vocab_size": setting("model.vocab_size", lambda found: found + 64),
    "genai_config: bos": setting("model.bos_token_id", lambda found: found + 1),
    "genai_config: pad": setting("model.pad_token_id", lambda found: found + 1),
    "genai_config: past names": setting(
        "model.decoder.inputs.past_key_names", lambda _: "past_key_values.%d.keys"
    ),
    "genai_config: present names": setting(
        "model.decoder.outputs.present_value_names", lambda _: "present.%d.key"
    ),
    "tokenizer: merge dropped": dropped_merge,
    "tokenizer: ids exchanged": swapped_entries,
    "tokenizer: special ids exchanged": special_id_off,
    "tokenizer: flag of a special token": special_flag,
    "chat template changed": template_changed,
    "stale data": stale_data,
    "zeroed page": zeroed_page,
    "truncated file": truncated,
}
