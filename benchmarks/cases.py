"""What is measured: each piece of work, who does it, and the ratios that must hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.sides import (
    Side,
    awq,
    bare_passes,
    builder,
    copy,
    llama_cpp,
    multiplications,
    olive,
    phiconv,
    phiconv_recipes,
    phiconv_validation,
    read_and_write,
)

Figure = Literal["wall", "cpu", "peak_rss"]

OURS = "phiconv"
BUILDER = "onnxruntime-genai builder"
OLIVE = "Olive"
LLAMA_CPP = "llama.cpp"
AUTOAWQ = "AutoAWQ"
COPY = "cp of input and output"
READ_WRITE = "read input, write output"
READ_WRITE_DIRECT = "read input, write output, O_DIRECT"
SINGLES = "five single builds"
PASSES = "two bare forward passes"
MULTIPLICATIONS = "one pass at GEMM rate"
FIVE = ("int4-cpu", "int4-cpu-acc1", "int4-cuda", "fp16-cuda", "gguf-q4_k_m")


@dataclass(frozen=True)
class Target:
    """A ratio that must hold: phiconv's figure over another side's.

    Attributes:
        figure: Which of the figures.
        over: The other side; None for an absolute limit.
        at_most: The largest ratio, or the limit in seconds or bytes.
    """

    figure: Figure
    over: str | None
    at_most: float


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        work: In words.
        model: Which checkpoint, see `benchmarks.models`.
        sides: Who does it, in the order of a round; phiconv first.
        targets: What must hold.
    """

    work: str
    model: str
    sides: Mapping[str, Side]
    targets: tuple[Target, ...]


CASES: Mapping[str, Case] = {
    "int4-cpu": Case(
        "int4 for CPU, ONNX",
        "3.8 B",
        {
            OURS: phiconv("int4-cpu"),
            READ_WRITE: read_and_write(),
            READ_WRITE_DIRECT: read_and_write(direct=True),
            COPY: copy(),
            BUILDER: builder("int4", "cpu"),
            OLIVE: olive("int4"),
        },
        (
            Target("wall", BUILDER, 1 / 10),
            Target("peak_rss", BUILDER, 1 / 14),
            Target("wall", READ_WRITE, 2),
        ),
    ),
    "int4-cuda": Case(
        "int4 for CUDA, ONNX",
        "3.8 B",
        {OURS: phiconv("int4-cuda"), BUILDER: builder("int4", "cuda")},
        (),
    ),
    "fp16-cuda": Case(
        "fp16 for CUDA, ONNX",
        "3.8 B",
        {
            OURS: phiconv("fp16-cuda"),
            READ_WRITE: read_and_write(),
            READ_WRITE_DIRECT: read_and_write(direct=True),
            COPY: copy(),
            BUILDER: builder("fp16", "cuda"),
        },
        (
            Target("wall", BUILDER, 1 / 3),
            Target("peak_rss", BUILDER, 1 / 5),
            Target("wall", READ_WRITE, 1.5),
        ),
    ),
    "gguf-q4_k_m": Case(
        "GGUF Q4_K_M",
        "1.1 B",
        {OURS: phiconv("gguf-q4_k_m"), COPY: copy(), LLAMA_CPP: llama_cpp("Q4_K_M")},
        (
            Target("wall", LLAMA_CPP, 1 / 3),
            Target("cpu", LLAMA_CPP, 1 / 3),
            Target("peak_rss", None, 1e9),
        ),
    ),
    "gguf-q8_0": Case(
        "GGUF Q8_0",
        "1.1 B",
        {OURS: phiconv("gguf-q8_0"), COPY: copy(), LLAMA_CPP: llama_cpp("Q8_0")},
        (Target("wall", LLAMA_CPP, 1 / 2), Target("wall", COPY, 2)),
    ),
    "gguf-q4_0": Case(
        "GGUF Q4_0",
        "1.1 B",
        {OURS: phiconv("gguf-q4_0"), COPY: copy(), LLAMA_CPP: llama_cpp("Q4_0")},
        (Target("wall", COPY, 2),),
    ),
    "awq-tiny": Case(
        "AWQ search, 128 windows of 512 tokens",
        "tiny",
        {OURS: awq(128), AUTOAWQ: awq(128, peer=True)},
        (Target("wall", AUTOAWQ, 1 / 3), Target("peak_rss", AUTOAWQ, 1 / 3)),
    ),
    # AutoAWQ takes hours a layer with 128 windows; both sides try every token, and get fewer alike.
    "awq": Case(
        "AWQ search, 4 windows of 512 tokens",
        "1.1 B",
        {OURS: awq(4), AUTOAWQ: awq(4, peer=True)},
        (Target("wall", AUTOAWQ, 1 / 3), Target("peak_rss", AUTOAWQ, 1 / 3)),
    ),
    "validation": Case(
        "validation of an int4 artifact",
        "1.1 B",
        {
            OURS: phiconv_validation("int4-cpu"),
            PASSES: bare_passes(),
            MULTIPLICATIONS: multiplications(),
        },
        (Target("wall", PASSES, 1.25),),
    ),
    "five-recipes": Case(
        "five recipes of one checkpoint, validated",
        "tiny",
        {OURS: phiconv_recipes(FIVE, single=False), SINGLES: phiconv_recipes(FIVE, single=True)},
        (Target("wall", SINGLES, 0.5),),
    ),
}

SCALING_LAYERS = (8, 16, 32, 64)
SCALING_RECIPE = "int4-cpu"
LARGEST = "14 B"
LARGEST_RSS = 2e9
"""Peak memory within which the largest shape must convert."""
