"""Measures phiconv beside the tools its users would pick instead, in one run on one machine.

    python -m benchmarks                      every case
    python -m benchmarks --only int4-cpu      one case
    python -m benchmarks --runs 3 --layers 8  smaller and repeated

Peer and phiconv run alternately on the same synthetic checkpoint, each as a process of its own;
wall time, CPU time and peak memory are the operating system's. phiconv starts cold: an empty
workspace for every run, after one run that is not counted and leaves the compiled kernels behind.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from benchmarks.measure import Usage, middle, run
from benchmarks.synthetic import Shape, write_checkpoint

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Case:
    """One piece of work and the command that each side does it with.

    Attributes:
        recipe: phiconv's recipe.
        peer: Name of the peer.
        command: The peer's command, from checkpoint, output folder and cache folder.
    """

    recipe: str
    peer: str
    command: Callable[[Path, Path, Path], list[str]]


def _builder(precision: str, provider: str) -> Callable[[Path, Path, Path], list[str]]:
    def command(checkpoint: Path, out: Path, cache: Path) -> list[str]:
        module = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        paths = ["-i", str(checkpoint), "-o", str(out), "-c", str(cache)]
        return [*module, *paths, "-p", precision, "-e", provider]

    return command


CASES = {
    "int4-cpu": Case("int4-cpu.yaml", "onnxruntime-genai builder", _builder("int4", "cpu")),
    "int4-cuda": Case("int4-cuda.yaml", "onnxruntime-genai builder", _builder("int4", "cuda")),
    "fp16-cuda": Case("fp16-cuda.yaml", "onnxruntime-genai builder", _builder("fp16", "cuda")),
}


def _phiconv(case: Case, checkpoint: Path, work: Path) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "phiconv", "build", str(RECIPES / case.recipe)]
    command += ["--model", str(checkpoint), "--out", str(work / "out"), "--skip-validation"]
    return command, {"PHICONV_HOME": str(work / "home")}


def _measure_case(case: Case, checkpoint: Path, scratch: Path, runs: int) -> dict[str, Usage]:
    """Median usage of both sides; the counted runs alternate."""
    usages: dict[str, list[Usage]] = {"phiconv": [], "peer": []}
    for index in range(runs + 1):
        work = scratch / "run"
        command, env = _phiconv(case, checkpoint, work)
        work.mkdir()
        usage = run(command, log=scratch / "phiconv.log", env=env)
        shutil.rmtree(work)
        if index == 0:
            continue
        usages["phiconv"].append(usage)
        peer = case.command(checkpoint, work / "peer", work / "cache")
        work.mkdir()
        usages["peer"].append(run(peer, log=scratch / "peer.log"))
        shutil.rmtree(work)
    return {side: middle(measured) for side, measured in usages.items()}


def _row(name: str, case: Case, ours: Usage, theirs: Usage) -> str:
    return (
        f"| {name} | {case.peer} "
        f"| {theirs.wall:.1f} s → {ours.wall:.1f} s (**{theirs.wall / ours.wall:.1f}×**) "
        f"| {theirs.cpu:.1f} s → {ours.cpu:.1f} s ({theirs.cpu / ours.cpu:.1f}×) "
        f"| {theirs.peak_rss / 1e9:.2f} GB → {ours.peak_rss / 1e9:.2f} GB "
        f"(**1/{theirs.peak_rss / ours.peak_rss:.1f}**) |"
    )


def _environment() -> dict[str, str]:
    packages = ("phiconv", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "numba")
    versions = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


@click.command(help=__doc__)
@click.option("--only", type=click.Choice(list(CASES)), multiple=True, help="Cases to run.")
@click.option("--runs", default=1, show_default=True, help="Counted runs of each side.")
@click.option("--layers", default=32, show_default=True, help="Layers of the synthetic model.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Folder for checkpoints and outputs; it needs 20 GB for 32 layers.",
)
@click.option("--keep", is_flag=True, help="Keep the synthetic checkpoint.")
def main(only: tuple[str, ...], runs: int, layers: int, scratch: Path, keep: bool) -> None:
    """Run the cases and print a Markdown table; results.json has every figure."""
    checkpoint = scratch / f"phi3-mini-{layers}-layers"
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch / "run", ignore_errors=True)
    if not (checkpoint / "model.safetensors.index.json").exists():
        size = write_checkpoint(checkpoint, Shape(layers=layers))
        click.echo(f"wrote {checkpoint}, {size / 2**30:.2f} GiB", err=True)
    results: dict[str, object] = {"environment": _environment(), "layers": layers, "runs": runs}
    click.echo("| work | peer | wall: peer → phiconv | CPU | peak memory |")
    click.echo("|---|---|---|---|---|")
    for name in only or CASES:
        usage = _measure_case(CASES[name], checkpoint, scratch, runs)
        results[name] = {side: asdict(figures) for side, figures in usage.items()}
        click.echo(_row(name, CASES[name], usage["phiconv"], usage["peer"]))
    (scratch / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    if not keep:
        shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
