"""Trains the small Phi-3s of examples/, of the real architecture, on texts of Python itself.

python examples/train_tiny_phi3.py --model tiny-phi3
python examples/train_tiny_phi3.py --model tiny-phi4-mini

Everything is seeded; the same versions, thread count and processor give the same weights. The
master weights are fp32, matrix products run in bf16, and the checkpoint is stored in bf16 and
measured as stored.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from chat_samples import CHAT_TEMPLATE, conversations
from corpus import Corpus, collect, docstrings, is_test
from held_out_perplexity import Perplexity, by_kind
from model_card import Training, write_model_card
from tiny_models import TINY_MODELS, TinyModel
from warm_start import start_from

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import Phi3ForCausalLM

Tokens = np.ndarray[Any, np.dtype[np.uint16]]

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "phiconv" / "data"
# As in Phi-3: the first three have the first ids, the others follow the vocabulary that was
# learned, and all strip what follows them but <unk>, <s> and <|endoftext|>.
FIRST_SPECIAL = ("<unk>", "<s>", "</s>")
LAST_SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
KEEP_WHITE_SPACE = ("<unk>", "<s>", "<|endoftext|>")
LEARNED_VOCABULARY = 3_500
# Share of the windows drawn from each part of the training text.
MIXTURE = {"library": 0.54, "tests": 0.20, "prose": 0.12, "chat": 0.14}
TOKENS_PER_STEP = 4_096
FINAL_LEARNING_RATE = 0.03  # of the peak
WARM_UP = 0.03
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or minutes."""

    steps: int
    minutes: float | None

    def progress(self, step: int, started: float) -> float:
        """Share of the run that is done, 1 at its end."""
        if self.minutes is None:
            return step / self.steps
        return (time.monotonic() - started) / (60 * self.minutes)


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Learns a byte-level BPE, with GPT-2's pattern, from the training text but the tests'."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_VOCABULARY,
        special_tokens=list(FIRST_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [d.text for d in corpus.train if not is_test(d.source)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, rstrip=token not in KEEP_WHITE_SPACE, normalized=False, special=True)
            for token in (*FIRST_SPECIAL, *LAST_SPECIAL)
        ]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, context: int, out: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template.

    The class is named GPT2Tokenizer, which is what this tokenizer is, because transformers and
    onnxruntime-extensions both know it; transformers' own TokenizersBackend is known only to it.
    """
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    text = json.dumps(config, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def token_streams(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Tokens]:
    """Encodes each part of the mixture as one stream, documents between <s> and <|endoftext|>."""
    code = [d for d in corpus.train if d.kind == "code"]
    library = [d.text for d in code if not is_test(d.source)]
    prose = ["\n\n".join(text for _, text, _ in docstrings(source)) for source in library]
    parts = {
        "library": library,
        "tests": [d.text for d in code if is_test(d.source)],
        "prose": [d.text for d in corpus.train if d.kind == "topic"] + prose,
    }
    begin, end = (tokenizer.token_to_id(token) for token in ("<s>", "<|endoftext|>"))
    streams = {}
    for name, texts in parts.items():
        encoded = [[begin, *e.ids, end] for e in tokenizer.encode_batch([t for t in texts if t])]
        streams[name] = np.concatenate([np.array(ids, np.uint16) for ids in encoded])
    chat = [e.ids for e in tokenizer.encode_batch(list(conversations(corpus.train)))]
    order = np.random.default_rng(0).permutation(len(chat))
    streams["chat"] = np.concatenate([np.array(chat[i], np.uint16) for i in order])
    return streams


def draw_windows(
    streams: dict[str, Tokens], length: int, generator: np.random.Generator
) -> torch.Tensor:
    """Draws one step's windows, int64 [windows, length + 1], at random places of random parts."""
    import torch

    count = TOKENS_PER_STEP // length
    names = generator.choice(list(MIXTURE), size=count, p=list(MIXTURE.values()))
    rows = []
    for name in names:
        stream = streams[name]
        start = generator.integers(len(stream) - length)
        rows.append(stream[start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then a cosine down to ``FINAL_LEARNING_RATE`` of the peak."""
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return peak * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def new_model(tiny: TinyModel, tokenizer: Tokenizer, seed: int) -> Phi3ForCausalLM:
    """An fp32 model of ``tiny.shape``, untrained or with another example's weights."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(seed)
    config = Phi3Config(
        **tiny.shape,
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    model = Phi3ForCausalLM(config)
    if tiny.start_from is not None:
        start_from(model, HERE / tiny.start_from)
    return model


def new_optimizer(model: Phi3ForCausalLM) -> torch.optim.AdamW:
    """AdamW; norms' weights do not decay."""
    import torch

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def next_token_loss(model: Phi3ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, of each window's tokens given those before; bf16 products."""
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: Phi3ForCausalLM,
    tiny: TinyModel,
    streams: dict[str, Tokens],
    budget: Budget,
    seed: int,
) -> int:
    """Trains in place, logging every hundred steps; returns the number of steps taken."""
    import torch

    generator = np.random.default_rng(seed)
    optimizer = new_optimizer(model)
    model.train()
    started = time.monotonic()
    losses: list[float] = []
    step = 0
    while (progress := budget.progress(step, started)) < 1:
        lengths = next(lengths for until, lengths in tiny.windows if progress < until)
        length = lengths[step % len(lengths)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tiny.peak_learning_rate, progress)
        loss = next_token_loss(model, draw_windows(streams, length, generator))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 100 == 0:
            elapsed = time.monotonic() - started
            click.echo(
                f"step {step}  {progress:4.0%}  window {length}  loss {np.mean(losses):.3f}  "
                f"{step * TOKENS_PER_STEP / elapsed:.0f} tokens/s  {elapsed / 60:.1f} min"
            )
            losses.clear()
    return step


def save_model(model: Phi3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors, weights in bf16."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=[tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|end|>")],
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    model.bfloat16().save_pretrained(out)


def measure(out: Path) -> dict[str, Perplexity]:
    """Perplexity of the stored checkpoint, computed in fp32, on the validation texts."""
    return by_kind(out, DATA / "validation.jsonl")


def tokenizer_of(tiny: TinyModel, corpus: Corpus) -> Tokenizer:
    """The tokenizer of the example that training starts from, or one learned from the text."""
    if tiny.start_from is None:
        return train_tokenizer(corpus)
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(HERE / tiny.start_from / "tokenizer.json"))


@click.command
@click.option("--model", "name", type=click.Choice(list(TINY_MODELS)), default="tiny-phi3")
@click.option("--out", type=click.Path(path_type=Path), help="Default: examples/MODEL.")
@click.option("--steps", type=int, help="Steps of 4096 tokens; default: as many as the model's.")
@click.option("--minutes", type=float, help="Train this long instead; not reproducible.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    name: str, out: Path | None, steps: int | None, minutes: float | None, threads: int, seed: int
) -> None:
    """Train a small Phi-3 on texts of Python itself, and measure the result."""
    import torch

    torch.set_num_threads(threads)
    started = time.monotonic()
    tiny = TINY_MODELS[name]
    out = out or HERE / name
    corpus = collect()
    tokenizer = tokenizer_of(tiny, corpus)
    streams = token_streams(corpus, tokenizer)
    for part, stream in streams.items():
        click.echo(f"{part}: {len(stream)} tokens, {MIXTURE[part]:.0%} of the windows")
    model = new_model(tiny, tokenizer, seed)
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, tiny.shape["max_position_embeddings"], out)
    taken = train(model, tiny, streams, Budget(steps or tiny.steps, minutes), seed)
    save_model(model, tokenizer, out)
    perplexity = measure(out)
    training = Training(
        name=name,
        windows=[length for _, lengths in tiny.windows for length in lengths],
        start_from=tiny.start_from,
        steps=taken,
        tokens=taken * TOKENS_PER_STEP,
        stream_tokens={part: len(stream) for part, stream in streams.items()},
        mixture=MIXTURE,
        minutes=(time.monotonic() - started) / 60,
        threads=threads,
        seed=seed,
    )
    write_model_card(out, training, perplexity)
    for kind, value in perplexity.items():
        click.echo(f"held-out perplexity, {kind}: {value.value:.3f} on {value.tokens} tokens")


if __name__ == "__main__":
    main()
