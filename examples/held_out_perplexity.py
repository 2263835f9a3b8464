"""Perplexity of a checkpoint on the held-out texts of phiconv/data.

A document is cut into windows of 512 tokens without any token added, and every token of a window
but the first is predicted from those before it in the window. The weights are computed with in
fp32, whatever they are stored in.

    python examples/held_out_perplexity.py examples/tiny-phi3 phiconv/data/validation.jsonl
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import click

WINDOW = 512
KINDS = ("code", "docstrings", "topic")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) over ``tokens`` predicted tokens."""

    negative_log_likelihood: float
    tokens: int

    @property
    def value(self) -> float:
        """The perplexity."""
        return math.exp(self.negative_log_likelihood / self.tokens)

    def __add__(self, other: Perplexity) -> Perplexity:
        """Perplexity over the tokens of both."""
        total = self.negative_log_likelihood + other.negative_log_likelihood
        return Perplexity(total, self.tokens + other.tokens)


def kind_of(source: str) -> str:
    """Kind of a held-out text, told from its source's name."""
    if source.startswith("topic:"):
        return "topic"
    return "docstrings" if source.endswith("#doc") else "code"


def by_kind(checkpoint: Path, texts: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, Perplexity]:
    """Measures each kind of held-out text, and ``all`` of those named.

    Args:
        checkpoint: folder of a Hugging Face checkpoint with its tokenizer.
        texts: JSON lines with ``source`` and ``text``.
        kinds: which of ``KINDS`` to measure.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    totals = {kind: Perplexity(0.0, 0) for kind in kinds}
    for line in texts.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = kind_of(record["source"])
        if kind not in totals:
            continue
        ids = torch.tensor(tokenizer.encode(record["text"], add_special_tokens=False))
        for start in range(0, len(ids) - 1, WINDOW):
            window = ids[start : start + WINDOW]
            with torch.inference_mode():
                logits = model(input_ids=window[None, :-1], use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum")
            totals[kind] += Perplexity(loss.item(), len(window) - 1)
    return totals | {"all": sum(totals.values(), start=Perplexity(0.0, 0))}


@click.command
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("texts", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(checkpoint: Path, texts: Path) -> None:
    """Print the perplexity of CHECKPOINT on each kind of text in TEXTS."""
    for kind, perplexity in by_kind(checkpoint, texts).items():
        click.echo(f"{kind}: {perplexity.value:.3f} on {perplexity.tokens} tokens")


if __name__ == "__main__":
    main()
