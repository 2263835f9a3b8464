"""Work without any tool around it, for floors: bare forward passes, and this machine's GEMM rate.

    python -m benchmarks.bare hugging-face CHECKPOINT
    python -m benchmarks.bare onnxruntime CHECKPOINT ARTIFACT
    python -m benchmarks.bare gemm
    python -m benchmarks.bare read-write [--direct] SOURCE... MADE TARGET

The first two load the model, then print the seconds of the forward passes alone, over the windows
of the default token set; `gemm` prints float32 operations a second. `read-write` reads the sources
and writes what MADE holds to TARGET, through one buffer, and past the page cache with --direct.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUFFER_BYTES = 4 << 20
BLOCK_BYTES = 4096
GEMM_SIZE = 3072


@click.group(help=__doc__)
def main() -> None:
    """The commands."""


def _windows(checkpoint: Path) -> NDArray[np.int64]:
    from phiconv.checkpoint import resolve
    from phiconv.tokens import DEFAULT, load_token_set

    return load_token_set(DEFAULT, resolve(str(checkpoint))).windows


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
def hugging_face(checkpoint: Path) -> None:
    """Transformers' own model in float32, window by window."""
    import torch
    from transformers import AutoModelForCausalLM

    windows = torch.from_numpy(_windows(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        print(_seconds(lambda: [model(window[None], use_cache=False).logits for window in windows]))


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
def onnxruntime(checkpoint: Path, artifact: Path) -> None:
    """The artifact in an ONNX Runtime session with its default options, window by window."""
    import numpy as np
    import onnxruntime as ort

    config = json.loads((artifact / "genai_config.json").read_text(encoding="utf-8"))
    decoder = config["model"]["decoder"]
    empty = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    windows = _windows(checkpoint)
    length = windows.shape[1]
    feeds = {"attention_mask": np.ones((1, length), np.int64)}
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            dtype = np.float16 if node.type == "tensor(float16)" else np.float32
            feeds[node.name] = np.zeros(empty, dtype)
    print(
        _seconds(
            lambda: [
                session.run(["logits"], {**feeds, "input_ids": window[None]}) for window in windows
            ]
        )
    )


@main.command()
def gemm() -> None:
    """Product of two square matrices, the best of five."""
    import torch

    a, b = (torch.rand(GEMM_SIZE, GEMM_SIZE) for _ in range(2))
    seconds = min(_seconds(lambda: a @ b) for _ in range(5))
    print(2 * GEMM_SIZE**3 / seconds)


@main.command()
@click.option("--direct", is_flag=True, help="Write with O_DIRECT (Linux).")
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True)
def read_write(paths: tuple[Path, ...], *, direct: bool) -> None:
    """Reads every source, then copies the last but one to the last."""
    *sources, made, target = paths
    view = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # where a page begins, as direct writes want it
    for source in sources:
        with source.open("rb", buffering=0) as file:
            while file.readinto(view):
                pass
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | (os.O_DIRECT if direct else 0)
    with made.open("rb", buffering=0) as file, os.fdopen(os.open(target, flags), "wb", 0) as out:
        while count := file.readinto(view):
            rest = view[: -(-count // BLOCK_BYTES) * BLOCK_BYTES if direct else count]
            while rest:
                rest = rest[out.write(rest) :]
        out.truncate(made.stat().st_size)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
