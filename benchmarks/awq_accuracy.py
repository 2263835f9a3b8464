"""Measures what rounding, AWQ and GPTQ cost in accuracy: KL divergence from fp32, held-out tokens.

    python -m benchmarks.awq_accuracy --work DIR                    tiny-phi3, and with outliers
    python -m benchmarks.awq_accuracy --work DIR --checkpoint GQA   another trained checkpoint, too
    python -m benchmarks.awq_accuracy --work DIR --peer-python PYTHON
    python -m benchmarks.awq_accuracy --work DIR --grid "32 symmetric" --method nearest --method AWQ

Every decoder weight is rounded on the grid by the writers' own kernels; head and embedding stay as
they are, so that the figures are about the decoder alone. The reference runs in fp32. The error of
a divergence, and that of its difference from AutoAWQ's, counts each window as one draw. PYTHON has
phiconv's dependencies and AutoAWQ, whose scales and limits are then measured in the same way.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.awq import measure
from benchmarks.awq_plots import draw_awq
from phiconv.awq.groups import GROUPS
from phiconv.awq.layer import LayerResult, Settings, search_layer
from phiconv.awq.statistics import InputStatistics, StatisticsCollector, sampled_tokens
from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import GroupRecord, Overlay
from phiconv.checkpoint.weight_source import Grid
from phiconv.kernels.matmulnbits import dequantize_rows, layout, quantize_rows
from phiconv.metrics.standard_error import standard_error
from phiconv.runtimes.activations import watch_layers
from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states
from phiconv.tokens import load_token_set

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-phi3"
GRIDS = {
    "32 symmetric": Grid(4, 32, True),
    "32 asymmetric": Grid(4, 32, False),
    "128 asymmetric": Grid(4, 128, False),
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "nearest": {"search": "none", "scale": False, "clip": False},
    "nearest, mse": {"search": "mse", "scale": False, "clip": False},
    "AWQ": {"search": "none", "scale": True, "clip": False},
    "AWQ + clip": {"search": "none", "scale": True, "clip": True},
    "AWQ + clip, mse": {"search": "mse", "scale": True, "clip": True},
    "GPTQ": {"search": "mse", "scale": False, "clip": False, "rounding": "gptq"},
    "AWQ + GPTQ": {"search": "mse", "scale": True, "clip": False, "rounding": "gptq"},
}
WINDOWS, LENGTH, GRAM_TOKENS, HELD_OUT = 128, 512, 16384, 8


class Rounded:
    """A checkpoint whose decoder weights are read as they are after rounding."""

    def __init__(
        self, checkpoint: Checkpoint, overlay: Overlay, codes: LayerResult, search: Any
    ) -> None:
        self._source = OverlaidCheckpoint(checkpoint, overlay, clip=True)
        self._grid, self._search, self._codes = overlay.grid, search, codes.codes
        linear = {
            group.weight(layer)
            for layer in range(checkpoint.config.num_hidden_layers)
            for group in GROUPS
        }
        self._linear = linear
        self.config, self.path = checkpoint.config, checkpoint.path
        self.read_rows = self._source.read_rows
        self.tensors = {
            name: dataclasses.replace(info, dtype="f32") if name in linear else info
            for name, info in self._source.tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """The weight, dequantized where it is one of the decoder's."""
        values = self._source.read(name)
        if name not in self._linear:
            return values
        bits, group_size, symmetric = self._grid
        if name in self._codes:
            packed, scales, zeros = self._codes[name]
        else:
            shapes = layout(*values.shape, bits=bits, block_size=group_size)
            packed, scales = np.empty(shapes.packed, np.uint8), np.empty(shapes.scales, np.float16)
            zeros = None if symmetric else np.empty(shapes.zero_points, np.uint8)
            quantize_rows(
                values, bits=bits, block_size=group_size, symmetric=symmetric,
                search=self._search, packed=packed, scales=scales, zero_points=zeros,
            )  # fmt: skip
        return dequantize_rows(
            packed, scales, zeros, bits=bits, block_size=group_size,
            K=values.shape[1], symmetric=symmetric,
        )  # fmt: skip


class Subject:
    """A checkpoint, the statistics of its calibration, and its reference."""

    def __init__(
        self,
        folder: Path,
        threads: int,
        windows: int = WINDOWS,
        length: int = LENGTH,
        held_out: int = HELD_OUT,
    ) -> None:
        self.checkpoint, self.threads = Checkpoint(folder), threads
        self.calibration = {"windows": windows, "window_length": length}
        self._head = LanguageModelHead(self.checkpoint, threads=threads)
        self._held_out = load_token_set(
            "default", self.checkpoint, windows=held_out, window_length=LENGTH
        ).windows
        self._expected = self._log_probabilities(self.checkpoint)
        self.statistics = self._calibrate()

    def _calibrate(self) -> dict[str, InputStatistics]:
        windows = load_token_set(
            "default", self.checkpoint, packaged="calibration", **self.calibration
        ).windows
        sample = sampled_tokens(windows.size, GRAM_TOKENS)
        collectors: dict[str, StatisticsCollector] = {}

        def watch(weight: str, values: Any) -> bool:
            return collectors.setdefault(weight, StatisticsCollector(sample)).add(values)

        found: dict[str, InputStatistics] = {}

        def after_layer(_: Any) -> None:
            found.update({name: collectors.pop(name).result() for name in list(collectors)})

        watch_layers(self.checkpoint, windows, watch, after_layer, threads=self.threads)
        return found

    def _log_probabilities(self, source: Any) -> np.ndarray:
        hidden = final_hidden_states(source, self._held_out, threads=self.threads)
        logits = self._head.logits(hidden.reshape(-1, hidden.shape[-1])).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def search(self, grid: Grid, method: Mapping[str, Any]) -> tuple[Overlay, LayerResult]:
        """What a method finds, layer by layer."""
        import torch

        settings = Settings(
            grid, method.get("rounding", "nearest"), method["search"], method["scale"],
            method["clip"], 0.01, self.threads,
        )  # fmt: skip
        whole = LayerResult()
        with torch.inference_mode():
            for layer in range(self.checkpoint.config.num_hidden_layers):
                lookup = {name: lambda name=name: self.statistics[name] for name in self.statistics}
                found = search_layer(self.checkpoint, layer, lookup, settings)
                for name in ("columns", "rows", "clips", "codes"):
                    getattr(whole, name).update(getattr(found, name))
                whole.records.extend(found.records)
        overlay = Overlay(
            self.checkpoint.digest, grid, columns=whole.columns, rows=whole.rows, clips=whole.clips
        )
        return overlay, whole

    def divergence(self, overlay: Overlay, found: LayerResult, search: str) -> np.ndarray:
        """KL divergence from the reference at every position of every window, in nats."""
        rounded = Rounded(self.checkpoint, overlay, found, search)
        candidate = self._log_probabilities(rounded)
        terms = np.exp(self._expected) * (self._expected - candidate)
        return np.asarray(terms.sum(axis=1).reshape(self._held_out.shape))


def losses(records: Sequence[GroupRecord]) -> list[dict[str, Any]]:
    """The relative output error that each weight is left with."""
    found = []
    for record in records:
        # limits that do not lower the loss are dropped
        nearest = [loss for loss in (record.loss_scaled, record.loss_clipped) if loss is not None]
        loss = min(nearest) if record.loss_gptq is None else record.loss_gptq
        found.append({"layer": record.layer, "group": record.group, "loss": loss})
    return found


def autoawq(subject: Subject, grid: Grid, python: str, folder: Path) -> np.ndarray:
    """The same figure for what AutoAWQ finds on the same tokens."""
    parameters = {
        "backend": "autoawq",
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "calibration": subject.calibration,
    }
    measure(python, subject.checkpoint.path, folder, parameters, subject.threads)
    return subject.divergence(Overlay.load(folder / "out"), LayerResult(), "none")


class Table:
    """The table as it is printed, and its figures."""

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        click.echo("| checkpoint | group | method | KL x 1000 | search, s |\n|---|---|---|---|---|")

    def add(
        self,
        checkpoint: str,
        grid: str,
        method: str,
        kl: np.ndarray,
        seconds: float,
        records: Sequence[GroupRecord] = (),
    ) -> None:
        """Prints and keeps a row; `kl` [windows, positions] in nats."""
        entry = {"checkpoint": checkpoint, "grid": grid, "method": method, "kl": float(kl.mean())}
        entry |= {"standard_error": standard_error(kl), "seconds": seconds}
        self.figures.append({**entry, "losses": losses(records)})
        click.echo(f"| {checkpoint} | {grid} | {method} | {_thousandfold(kl)} | {seconds:.1f} |")


def _thousandfold(kl: np.ndarray, sign: str = "") -> str:
    """Mean and standard error x 1000."""
    return f"{1000 * kl.mean():{sign}.3f} ± {1000 * standard_error(kl):.3f}"


@click.command(help=__doc__)
@click.option("--work", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--checkpoint", "others", type=click.Path(path_type=Path), multiple=True)
@click.option("--peer-python", help="A Python with AutoAWQ.")
@click.option("--windows", default=WINDOWS, show_default=True, help="Calibration windows.")
@click.option("--window-length", default=LENGTH, show_default=True, help="Tokens of one.")
@click.option("--held-out", default=HELD_OUT, show_default=True, help="Windows of 512 to judge on.")
@click.option("--threads", default=2, show_default=True)
@click.option("--grid", "grids", type=click.Choice(list(GRIDS)), multiple=True, help="Only these.")
@click.option(
    "--method", "methods", type=click.Choice(list(METHODS)), multiple=True, help="Only these."
)
def main(
    folder: Path,
    others: tuple[Path, ...],
    peer_python: str | None,
    windows: int,
    window_length: int,
    held_out: int,
    threads: int,
    grids: tuple[str, ...],
    methods: tuple[str, ...],
) -> None:
    """Measure, print a table, and keep figures, and plots of all methods, in FOLDER."""
    from tests.outlier_checkpoints import inject_outliers

    folder.mkdir(parents=True, exist_ok=True)
    outliers = inject_outliers(TINY, folder / "tiny-phi3-outliers")
    table = Table()
    for path in (TINY, outliers, *others):
        subject = Subject(path, threads, windows, window_length, held_out)
        for name in grids or GRIDS:
            grid, found_by = GRIDS[name], {}
            for method in methods or METHODS:
                settings = METHODS[method]
                start = time.perf_counter()
                overlay, found = subject.search(grid, settings)
                seconds = time.perf_counter() - start
                kl = found_by[method] = subject.divergence(overlay, found, settings["search"])
                table.add(path.name, name, method, kl, seconds, found.records)
            config = subject.checkpoint.config
            grouped = config.num_key_value_heads != config.num_attention_heads
            if peer_python and not grid.symmetric and not grouped:
                start = time.perf_counter()
                work = folder / f"autoawq-{path.name}-{name.replace(' ', '-')}-{time.time_ns()}"
                kl = autoawq(subject, grid, peer_python, work)
                table.add(path.name, name, "AutoAWQ", kl, time.perf_counter() - start)
                for method, own in found_by.items():
                    click.echo(f"{method} - AutoAWQ: {_thousandfold(own - kl, '+')}")
    text = json.dumps({"python": sys.version.split()[0], "figures": table.figures}, indent=1)
    (folder / "awq-accuracy.json").write_text(text + "\n", encoding="utf-8")
    if not grids and not methods:
        draw_awq(folder, table.figures)


if __name__ == "__main__":
    main()
