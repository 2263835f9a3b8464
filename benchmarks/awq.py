"""Measures the stage `awq` by phase and layer, and AutoAWQ beside it on the same tokens.

    python -m benchmarks.awq --layers 4                          a model of Phi-3-mini's width
    python -m benchmarks.awq --layers 4 --rounding gptq
    python -m benchmarks.awq --layers 1 --windows 4 --peer-python PYTHON

PYTHON has phiconv's dependencies and AutoAWQ (docs/interoperability.md). AutoAWQ takes hours a
layer on a CPU with the default 128 windows, so the comparison is made on few: both sides run every
token through every trial, and get fewer alike.

Each run is a process of its own; peak memory is the operating system's. On a machine that does
other work, too, look at the processor's seconds: `--threads 1` makes them those of one quiet core.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from benchmarks.measure import run
from benchmarks.synthetic import Shape, write_checkpoint

PHASES = {
    "forward": ("phiconv.runtimes.activations", "run_layer"),
    "statistics": ("phiconv.awq.statistics", "StatisticsCollector.add"),
    "finish statistics": ("phiconv.awq.statistics", "StatisticsCollector.result"),
    "scales": ("phiconv.awq.layer", "_scaling"),
    "clips": ("phiconv.awq.layer", "search_clips"),
    "factor": ("phiconv.awq.gptq", "_factor"),
    "gptq": ("phiconv.awq.gptq", "Gptq.round"),
    "save": ("phiconv.awq.resume", "FinishedLayers.save"),
}
"""The function whose time is a phase's. Statistics are taken while the model runs forward, and
GPTQ's trials while scales are searched: the inner phase is taken off the outer one."""


class Stopwatch:
    """Wall and processor time of nested phases; what an inner one takes is not the outer one's."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._inner: list[list[float]] = []

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are added to a phase."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append([0.0, 0.0])
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = (time.perf_counter() - wall, time.process_time() - cpu)
                inner = self._inner.pop()
                self.wall[phase] = self.wall.get(phase, 0.0) + took[0] - inner[0]
                self.cpu[phase] = self.cpu.get(phase, 0.0) + took[1] - inner[1]
                if self._inner:
                    self._inner[-1][0] += took[0]
                    self._inner[-1][1] += took[1]

        return call

    def watch(self) -> None:
        """Times every phase."""
        from importlib import import_module

        for phase, (module, path) in PHASES.items():
            owner: Any = import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, name, self.timed(phase, getattr(owner, name)))


def work(checkpoint: Path, folder: Path, parameters: dict[str, Any], threads: int) -> None:
    """Runs the stage in this process and writes its phases to `folder`/phases.json."""
    from phiconv.checkpoint import Checkpoint
    from phiconv.stages.awq import Awq, AwqParams
    from phiconv.stages.stage import StageContext

    opened = Checkpoint(checkpoint)
    opened.hash_files()
    params = AwqParams.model_validate(parameters)
    stopwatch = Stopwatch()
    stopwatch.watch()
    out = folder / "out"
    out.mkdir()
    context = StageContext(out, (), opened, threads=threads, unfinished=folder / "unfinished")
    stopwatch.timed("rest", Awq().run)(params, context)
    document = {"wall": stopwatch.wall, "cpu": stopwatch.cpu}
    (folder / "phases.json").write_text(json.dumps(document), encoding="utf-8")


def measure(
    python: str, checkpoint: Path, folder: Path, parameters: dict[str, Any], threads: int
) -> dict[str, Any]:
    """Runs the stage in a process of its own."""
    folder.mkdir(parents=True)
    code = "import json, sys; from pathlib import Path; from benchmarks.awq import work; "
    code += "work(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))"
    arguments = [str(checkpoint), str(folder), json.dumps(parameters), str(threads)]
    root = str(Path(__file__).parent.parent)
    environment = {"PYTHONPATH": root, "OMP_NUM_THREADS": str(threads)}
    usage = run([python, "-c", code, *arguments], log=folder / "log", env=environment)
    phases = json.loads((folder / "phases.json").read_text(encoding="utf-8"))
    return {"wall": usage.wall, "cpu": usage.cpu, "peak_rss": usage.peak_rss, "phases": phases}


def report(name: str, found: dict[str, Any], layers: int) -> None:
    """Prints one run, by layer."""
    click.echo(
        f"{name}: {found['wall'] / layers:.1f} s a layer, {found['cpu'] / layers:.1f} CPU-s, "
        f"peak {found['peak_rss'] / 2**30:.2f} GiB"
    )
    for phase, seconds in found["phases"]["wall"].items():
        cpu = found["phases"]["cpu"][phase]
        click.echo(f"  {phase:18} {seconds / layers:8.1f} s {cpu / layers:8.1f} CPU-s")


@click.command(help=__doc__)
@click.option("--layers", default=4, show_default=True)
@click.option("--hidden", default=3072, show_default=True)
@click.option("--intermediate", default=8192, show_default=True)
@click.option("--windows", default=128, show_default=True, help="Windows of 512 tokens.")
@click.option("--group-size", default=128, show_default=True)
@click.option("--rounding", type=click.Choice(["nearest", "gptq"]), default="nearest")
@click.option("--compute", type=click.Choice(["fp32", "bf16"]), default="bf16", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--peer-python", help="A Python with AutoAWQ, to run beside.")
@click.option("--work", "folder", type=click.Path(path_type=Path), required=True)
def main(
    layers: int,
    hidden: int,
    intermediate: int,
    windows: int,
    group_size: int,
    rounding: str,
    compute: str,
    threads: int,
    peer_python: str | None,
    folder: Path,
) -> None:
    """Measure, print, and keep the figures in FOLDER/awq.json."""
    checkpoint = folder / "checkpoint"
    shape = Shape(layers=layers, hidden=hidden, intermediate=intermediate, vocabulary=3520)
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shape)
    parameters: dict[str, Any] = {
        "group_size": group_size,
        "rounding": rounding,
        "calibration": {"windows": windows, "compute": compute},
    }
    stamp = f"{time.time_ns()}"
    found = {
        "phiconv": measure(
            sys.executable, checkpoint, folder / f"phiconv-{stamp}", parameters, threads
        )
    }
    report("phiconv", found["phiconv"], layers)
    if peer_python:
        parameters["backend"] = "autoawq"
        found["autoawq"] = measure(
            peer_python, checkpoint, folder / f"autoawq-{stamp}", parameters, threads
        )
        report("AutoAWQ", found["autoawq"], layers)
    document = json.dumps({"layers": layers, "parameters": parameters, **found}, indent=1)
    (folder / "awq.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
