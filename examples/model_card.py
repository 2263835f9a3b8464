"""The model card of a checkpoint under examples/, written from what was measured."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from held_out_perplexity import WINDOW, Perplexity


@dataclass(frozen=True)
class Training:
    """What a training run was given and how long it took.

    Attributes:
        windows: the window lengths trained on, in the order they were first used.
        start_from: the example whose weights it started from; None: from nothing.
        minutes: of wall time.
    """

    name: str
    windows: list[int]
    start_from: str | None
    steps: int
    tokens: int
    stream_tokens: dict[str, int]
    mixture: dict[str, float]
    minutes: float
    threads: int
    seed: int


CARD = """\
---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

A small `Phi3ForCausalLM` of {parameters:,} parameters, trained from {origin}, so that every step of
phiconv can be run, measured and tested on a real checkpoint without a download. It has learned
what Python's standard library looks like; it knows nothing and is of no use as an assistant.

## Shape

| | |
|---|---|
{shape}
{rope}
The tokenizer is a byte-level BPE of {tokens_known:,} tokens with GPT-2's splitting pattern and
Phi-3's special tokens; the last {padding} rows of the embedding and of the head are never used, as
in Phi-3. The chat template is Phi-3's. Weights are stored in bf16.

## Text

What ships with Python {python} itself: standard-library sources and tests, their docstrings,
pydoc's help topics, and conversations made of docstrings. The text is under Python's licence
([PSF-2.0](https://docs.python.org/3.11/license.html)), and so are the weights where they count as
derived from it. Files held out for calibration and validation were not trained on, nor were files
that repeat passages of theirs; `examples/corpus.py` makes the split.

| part | tokens | share of the training windows |
|---|---|---|
{mixture}

## Held-out perplexity

Of this checkpoint as stored, computed in fp32 on `phiconv/data/validation.jsonl`, windows of
{window} tokens (`python examples/held_out_perplexity.py examples/{name}
phiconv/data/validation.jsonl`):

| text | perplexity | predicted tokens |
|---|---|---|
{perplexity}

## Training

    python examples/train_tiny_phi3.py{model} --steps {steps} --threads {threads} --seed {seed}

{steps:,} steps of 4,096 tokens ({tokens:.1f} M tokens), {minutes:.0f} minutes on {threads} CPU
threads: AdamW with fp32 master weights and bf16 matrix products, cosine schedule, windows of
{windows} tokens. Versions: Python {python}, torch {torch},
transformers {transformers}, tokenizers {tokenizers}. Another
processor or version gives slightly other weights.
"""

ROPE = """
Rotary embedding: LongRoPE over {partial_rotary_factor:.0%} of each head, as in Phi-4-mini with a
smaller context. Texts of up to {original_max_position_embeddings:,} tokens use the short factors,
all {short:g}; longer ones the long factors, from {fastest:g} for the fastest pair to {slowest:g}
for the slowest. Both lengths were trained.
"""
STARTED_FROM = (
    "`examples/{start_from}`\n(its key and value heads averaged in pairs, its head the tied "
    "embedding)"
)
# A card that was written before there was a choice of models names none.
FIRST_MODEL = "tiny-phi3"

SHAPE_ROWS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "sliding_window",
    "tie_word_embeddings",
)


def write_model_card(out: Path, training: Training, perplexity: dict[str, Perplexity]) -> None:
    """Writes README.md beside the checkpoint in ``out``."""
    import tokenizers
    import torch
    import transformers
    from safetensors import safe_open

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(out))
    with safe_open(out / "model.safetensors", "np") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    card = CARD.format(
        name=training.name,
        model="" if training.name == FIRST_MODEL else f" --model {training.name}",
        origin=STARTED_FROM.format(start_from=training.start_from)
        if training.start_from
        else "nothing",
        rope=rope_paragraph(config["rope_parameters"]),
        windows=", then ".join(f"{length:,}" for length in training.windows),
        parameters=sum(torch.Size(shape).numel() for shape in shapes),
        shape="\n".join(f"| {key} | {config[key]} |" for key in SHAPE_ROWS),
        tokens_known=vocabulary,
        padding=config["vocab_size"] - vocabulary,
        mixture="\n".join(
            f"| {name} | {count:,} | {training.mixture[name]:.0%} |"
            for name, count in training.stream_tokens.items()
        ),
        perplexity="\n".join(
            f"| {kind} | {p.value:.3f} | {p.tokens:,} |" for kind, p in perplexity.items()
        ),
        window=WINDOW,
        steps=training.steps,
        tokens=training.tokens / 1e6,
        minutes=training.minutes,
        threads=training.threads,
        seed=training.seed,
        python=platform.python_version(),
        torch=torch.__version__.partition("+")[0],
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )
    (out / "README.md").write_text(card, encoding="utf-8", newline="\n")


def rope_paragraph(rope: dict[str, Any]) -> str:
    """What the card says of LongRoPE; nothing of plain rotary embedding."""
    if rope["rope_type"] != "longrope":
        return ""
    factors = {"short": rope["short_factor"][0], "fastest": rope["long_factor"][0]}
    return ROPE.format(**rope, **factors, slowest=rope["long_factor"][-1])
