"""Faults in a GGUF file's metadata, its tokens and its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.faults.planting import Site, Truth
from benchmarks.faults.stored import GgufWeights

GgufFault = Callable[[GgufWeights, Site], Truth | None]
_ARCHITECTURE = "phi3"


def key(name: str, component: str, *choices: Callable[[Any], Any]) -> GgufFault:
    """One number of the metadata is another; `component` is what it goes into."""

    def plant(weights: GgufWeights, site: Site) -> Truth | None:
        field = weights.reader.fields.get(name)
        if field is None:
            return None
        value = field.parts[field.data[0]]
        before = value[0].item()
        value[0] = site.random.choice(choices)(before)
        if value[0].item() == before:
            return None
        what = f"{name}: {before:.6g} becomes {value[0].item():.6g}"
        return Truth(
            what, (component,) if component else (), words=(name.removeprefix(f"{_ARCHITECTURE}."),)
        )

    return plant


def rope_factor(weights: GgufWeights, site: Site) -> Truth | None:
    """One of LongRoPE's factors is another, or short and long ones are exchanged."""
    short, long = (weights.vector(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
    if short is None or long is None:
        return None
    if site.random.random() < 0.5:
        short[:], long[:] = long.copy(), short.copy()
        return Truth("short and long factors are exchanged", ("self_attn.rotary",))
    kind, values = site.random.choice((("short", short), ("long", long)))
    index = site.random.randrange(len(values))
    values[index] *= site.random.choice((0.5, 1.1, 3.0))
    return Truth(f"{kind} factor {index} is {values[index]:.3g}", ("self_attn.rotary",))


def exchanged_tokens(weights: GgufWeights, site: Site) -> Truth:
    """Two tokens of one length have each other's ids."""
    field = weights.reader.fields["tokenizer.ggml.tokens"]
    one, two = _two_alike(field, site)
    field.parts[one][:], field.parts[two][:] = field.parts[two].copy(), field.parts[one].copy()
    tokens = [bytes(field.parts[index]).decode(errors="replace") for index in (one, two)]
    return Truth(f"tokens {tokens[0]!r} and {tokens[1]!r} are exchanged", words=("token", "encode"))


def doubled_merge(weights: GgufWeights, site: Site) -> Truth:
    """A merge is missing: another of its length stands in its place."""
    field = weights.reader.fields["tokenizer.ggml.merges"]
    one, two = _two_alike(field, site)
    text = bytes(field.parts[one]).decode(errors="replace")
    field.parts[one][:] = field.parts[two]
    return Truth(f"merge {text!r} is missing", words=("token", "encode"))


def _two_alike(field: Any, site: Site) -> tuple[int, int]:
    """Two strings of an array that are equally long: indices of their bytes."""
    while True:
        one, two = site.random.sample(list(field.data), 2)
        if len(field.parts[one]) == len(field.parts[two]) and one != two:
            return one, two


def token_type(weights: GgufWeights, site: Site) -> Truth:
    """A control token is an ordinary one, or the other way round."""
    field = weights.reader.fields["tokenizer.ggml.token_type"]
    control, normal = 3, 1
    numbers = [field.parts[index] for index in field.data]
    chosen = site.random.choice((control, normal))
    among = [index for index, number in enumerate(numbers) if number[0] == chosen]
    token = site.random.choice(among)
    numbers[token][0] = normal if chosen == control else control
    return Truth(f"token {token} has type {numbers[token][0]}", words=("token", "encode", "stream"))


def template(weights: GgufWeights, site: Site) -> Truth:
    """One character of the chat template is another."""
    text = _string(weights, "tokenizer.chat_template")
    index = site.random.randrange(len(text))
    text[index] = ord("#") if text[index] != ord("#") else ord("-")
    return Truth(f"character {index} of the template is #", words=("template",))


def name(weights: GgufWeights, _: Site) -> Truth:
    """general.name no longer says Phi3, by which llama.cpp strips spaces after special tokens."""
    text = _string(weights, "general.name")
    text[:] = bytearray(b"q" * len(text))
    return Truth("general.name is another", words=("token", "encode", "general.name"))


def pre_tokenizer(weights: GgufWeights, site: Site) -> Truth:
    """Text is cut by other rules before it is merged."""
    text = _string(weights, "tokenizer.ggml.pre")
    other = {"gpt-2": "qwen2", "gpt-4o": "llama3"}.get(bytes(text).decode(), "gpt-2")
    other = other.ljust(len(text))[: len(text)]
    text[:] = bytearray(other.encode())
    return Truth(f"tokenizer.ggml.pre is {other!r}", words=("token", "encode", "load"))


def truncated(weights: GgufWeights, site: Site) -> Truth:
    """The file ends early."""
    size = site.path.stat().st_size
    keep = size - site.random.choice((1, 4096, size // 3))
    with site.path.open("r+b") as file:
        file.truncate(keep)
    return Truth(f"it ends after {keep} of {size} bytes", words=("ends", "load"))


def zeroed_page(weights: GgufWeights, site: Site) -> Truth:
    """A page of the weights is zero, as after a copy that was broken off."""
    start = weights.reader.data_offset // 4096 + 1
    page = site.random.randrange(start, site.path.stat().st_size // 4096)
    weights.reader.data[4096 * page : 4096 * (page + 1)] = 0
    return Truth(f"page {page} is zero", ("*",))


def _string(weights: GgufWeights, name: str) -> Any:
    field = weights.reader.fields[name]
    return field.parts[field.data[0]]


def _metadata(name: str, component: str, *choices: Callable[[Any], Any]) -> GgufFault:
    return key(f"{_ARCHITECTURE}.{name}", component, *choices)


_ROTARY, _ATTENTION = "self_attn.rotary", "self_attn.attention"

GGUF_FAULTS: Mapping[str, GgufFault] = {
    "wrong epsilon": _metadata(
        "attention.layer_norm_rms_epsilon", "norm", lambda _: 1e-6, lambda _: 1e-12, lambda _: 1e-3
    ),
    "rotary: theta": _metadata(
        "rope.freq_base",
        _ROTARY,
        lambda found: found * 50,
        lambda found: found * 1.05,
        lambda found: found / 10,
    ),
    "rotary: partial factor": _metadata(
        "rope.dimension_count", _ROTARY, lambda found: 64 if found == 48 else 48
    ),
    "rotary: cache scaled": _metadata(
        "rope.scaling.attn_factor", _ROTARY, lambda found: found * 1.1, lambda found: found * 0.8
    ),
    "rotary: LongRoPE's factors": rope_factor,
    "rotary: original context": _metadata(
        "rope.scaling.original_context_length", _ROTARY, lambda found: found // 4
    ),
    "number of heads": _metadata(
        "attention.head_count", _ATTENTION, lambda found: found * 2, lambda found: found // 2
    ),
    "number of key/value heads": _metadata(
        "attention.head_count_kv", _ATTENTION, lambda found: found * 2, lambda found: found // 2
    ),
    "window of another size": _metadata(
        "attention.sliding_window", _ATTENTION, lambda _: 128, lambda found: found + 1
    ),
    "window missing": _metadata("attention.sliding_window", _ATTENTION, lambda _: 0),
    "context_length": _metadata("context_length", "", lambda found: found * 32),
    "eos": key("tokenizer.ggml.eos_token_id", "", lambda found: found + 2, lambda _: 2),
    "eot": key("tokenizer.ggml.eot_token_id", "", lambda found: found + 1),
    "bos": key("tokenizer.ggml.bos_token_id", "", lambda found: found + 1),
    "pad": key("tokenizer.ggml.padding_token_id", "", lambda found: found + 1),
    "add_bos": key("tokenizer.ggml.add_bos_token", "", lambda found: not found),
    "tokenizer: ids exchanged": exchanged_tokens,
    "tokenizer: merge dropped": doubled_merge,
    "tokenizer: type of a token": token_type,
    "tokenizer: pre-tokenizer": pre_tokenizer,
    "tokenizer: name": name,
    "chat template changed": template,
    "zeroed page": zeroed_page,
    "truncated file": truncated,
}
