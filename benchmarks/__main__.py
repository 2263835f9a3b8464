r"""Measures phiconv beside the tools its users would pick instead, in one run on one machine.

    \b
    python -m benchmarks                               everything
    python -m benchmarks --only int4-cpu               one piece of work
    python -m benchmarks --only int4-cpu --layers 8    on a smaller model
    python -m benchmarks --only scaling --only largest

All sides run by turns on one checkpoint, each as a process of its own; wall time, CPU time, peak
memory and bytes read and written are the operating system's. The checkpoint, and an artifact for
sides that copy it, are read once before every run, so that nobody pays for what another's
memory drove out of the page cache, or never was in it; and what another left there to be written is
written first. phiconv starts cold: an empty workspace for every run, after one run that is not
counted and leaves the compiled kernels behind.
A peer that is not there is listed as not measured. results.json keeps what earlier calls measured,
and the tables and plots beside it show all of it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from benchmarks import models
from benchmarks.cases import CASES, LARGEST, OURS, SCALING_LAYERS, SCALING_RECIPE, Case
from benchmarks.measure import CommandFailedError, Usage
from benchmarks.plots import draw_figures, draw_scaling
from benchmarks.results import (
    Measured,
    entry_of,
    figures_table,
    save,
    scaling_entry,
    scaling_table,
    targets_table,
)
from benchmarks.sides import (
    Done,
    Peers,
    Place,
    Side,
    divergence,
    phiconv,
    read_through,
    size_of,
    weights_of,
)

RESULTS = "results.json"
PACKAGES = (
    *("phiconv", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "numba"),
    *("olive-ai", "llama-cpp-python"),
)


def _measure(case: Case, peers: Peers, layers: int | None, scratch: Path, runs: int) -> Measured:
    """Rounds in which every side works once; the first of phiconv's runs is not counted."""
    measured = Measured(None if case.model == "tiny" else layers)
    measured.not_measured = {
        name: reason for name, side in case.sides.items() if (reason := side.missing(peers))
    }
    sides = {name: s for name, s in case.sides.items() if name not in measured.not_measured}
    with models.checkpoint(case.model, layers, scratch, keep=True) as checkpoint:
        weights = 0 if case.model == "tiny" else models.parameters(case.model, layers)
        for index in range(runs + 1):
            made: dict[str, Path] = {}
            for name in list(sides) if index else [OURS]:
                work = scratch / "run" / str(len(made))
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                try:
                    done = _run(name, sides[name], Place(checkpoint, work, peers, made, weights))
                except CommandFailedError as error:
                    _give_up(name, error, sides, measured)
                    continue
                if done.artifact is not None:
                    measured.sizes[name] = size_of(done.artifact)
                made[name] = done.artifact or work
                if index:
                    measured.rounds.setdefault(name, []).append(done.usage)
            shutil.rmtree(scratch / "run")
    return measured


def _give_up(
    name: str, error: CommandFailedError, sides: dict[str, Side], measured: Measured
) -> None:
    """Leaves a side that fails out of the rounds; what phiconv cannot do ends everything."""
    if name == OURS:
        raise error
    del sides[name]
    measured.rounds.pop(name, None)
    measured.not_measured[name] = f"failed: {str(error).strip().splitlines()[-1]}"
    click.echo(f"  {name}: {measured.not_measured[name]}", err=True)


def _run(name: str, side: Side, place: Place) -> Done:
    """Runs a side as if nobody ran before: inputs in the page cache, nothing left to be written."""
    os.sync()
    for path in weights_of(place.checkpoint):
        read_through(path)
    done = side.run(place)
    click.echo(f"  {name}: {done.usage.wall:.1f} s, {done.usage.cpu:.1f} s of CPU", err=True)
    return done


def _accuracy(case: Case, measured: Measured, peers: Peers, scratch: Path) -> None:
    """The divergence of what each side makes of the trained checkpoint."""
    folder = scratch / "accuracy"
    for name, side in case.sides.items():
        if side.converts and name not in measured.not_measured:
            work = folder / "work"
            work.mkdir(parents=True)
            done = side.run(Place(models.TINY, work, peers, {}, 0))
            assert done.artifact is not None
            measured.divergences[name] = divergence(done.artifact, models.TINY, folder)
            shutil.rmtree(work)


def _scaling(peers: Peers, scratch: Path, *, largest: bool, keep: bool) -> dict[str, Any]:
    """Builds alone, without a peer, with more and more layers, or on the largest shape."""
    side = phiconv(SCALING_RECIPE)
    usages: dict[int, Usage] = {}
    shapes = [(LARGEST, None)] if largest else [("3.8 B", count) for count in SCALING_LAYERS]
    for model, count in shapes:
        with models.checkpoint(model, count, scratch, keep=keep) as checkpoint:
            work = scratch / "run"
            work.mkdir()
            done = _run(f"{model}, {count or 'all'} layers", side, _place(checkpoint, work, peers))
            usages[count or 0] = done.usage
            shutil.rmtree(work)
    return scaling_entry({} if largest else usages, usages[0] if largest else None, _environment())


def _place(checkpoint: Path, work: Path, peers: Peers) -> Place:
    return Place(checkpoint, work, peers, {}, 0)


def _environment() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": versions,
    }


def _write_reports(out: Path) -> str:
    """Tables and plots of everything in results.json; returns the tables."""
    results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    cases = {name: results[name] for name in CASES if name in results}
    tables = []
    if cases:
        tables += [figures_table(cases), targets_table(cases)]
        draw_figures(out / "wall.svg", cases, "wall", "seconds")
        draw_figures(out / "memory.svg", cases, "peak_rss", "peak memory, GB")
    for name in ("scaling", "largest"):
        if name in results:
            tables.append(scaling_table(results[name]))
    if "scaling" in results:
        draw_scaling(out / "scaling.svg", results["scaling"])
    text = "\n\n".join(tables) + "\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    return text


@click.command(help=__doc__)
@click.option(
    "--only",
    type=click.Choice([*CASES, "scaling", "largest"]),
    multiple=True,
    help="What to measure.",
)
@click.option("--runs", default=1, show_default=True, help="Counted rounds.")
@click.option("--layers", type=int, help="Layers of synthetic models [default: the shape's].")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="Threads of each side.")
@click.option("--llama-cpp", help="Folder of llama.cpp's sources.")
@click.option("--llama-python", help="A Python with llama-cpp-python.")
@click.option("--olive-python", help="A Python with olive-ai.")
@click.option("--awq-python", help="A Python with phiconv's dependencies and AutoAWQ.")
@click.option("--no-kl", is_flag=True, help="Leave the accuracy on the trained checkpoint out.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Folder for checkpoints and outputs: 20 GB for 3.8 B, 45 GB for the largest.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of results.json, tables and plots [default: the scratch folder].",
)
@click.option("--keep", is_flag=True, help="Keep the synthetic checkpoints.")
def main(
    only: tuple[str, ...],
    runs: int,
    layers: int | None,
    scratch: Path,
    out: Path | None,
    keep: bool,
    no_kl: bool,
    **peers_at: Any,
) -> None:
    """Measure, and write results.json, results.md and plots."""
    scratch, peers = scratch.absolute(), Peers(**peers_at)
    out = (out or scratch).absolute()
    for folder in (scratch, out):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = only or (*CASES, "scaling", "largest")
    for name in ("run", "accuracy"):
        shutil.rmtree(scratch / name, ignore_errors=True)
    for name in wanted:
        click.echo(name, err=True)
        if name in CASES:
            measured = _measure(CASES[name], peers, layers, scratch, runs)
            if not no_kl:
                _accuracy(CASES[name], measured, peers, scratch)
            save(out / RESULTS, name, entry_of(name, measured, _environment()))
        else:
            entry = _scaling(peers, scratch, largest=name == "largest", keep=keep)
            save(out / RESULTS, name, entry)
    shutil.rmtree(scratch / "accuracy", ignore_errors=True)
    if not keep:
        for folder in scratch.glob("*-layers"):
            shutil.rmtree(folder)
    click.echo(_write_reports(out))


if __name__ == "__main__":
    main()
