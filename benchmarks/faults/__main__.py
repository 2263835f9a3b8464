"""Plants faults, class by class and artifact by artifact, and writes what was caught and named."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import click

from benchmarks.faults.subjects import KINDS, MODELS, build_all
from benchmarks.faults.table import table
from benchmarks.faults.trial import CLEAN, Trial, Verdict, classes, run

RESULTS, TABLE = "faults.jsonl", "faults.md"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of all of it.")
@click.option("--seed", default=0, show_default=True, help="Chooses where each fault is planted.")
@click.option("--count", default=4, show_default=True, help="Faults of each class.")
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), default=MODELS)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), default=list(KINDS))
@click.option("--fault", "faults", multiple=True, help="Only these classes.")
def main(
    out: Path,
    seed: int,
    count: int,
    models: Sequence[str],
    kinds: Sequence[str],
    faults: Sequence[str],
) -> None:
    """Plant single random faults in clean artifacts of the example checkpoints.

    Each fault of a class goes into another artifact, as long as there are any that can have it.
    """
    out.mkdir(parents=True, exist_ok=True)
    build_all(out, {name: KINDS[name] for name in kinds})
    subjects = [(model, kind) for model in models for kind in kinds]
    names = dict.fromkeys(name for kind in kinds for name in classes(kind))
    verdicts = []
    with (out / RESULTS).open("w", encoding="utf-8") as lines, _Pool(out) as pool:
        for fault in names:
            if faults and fault not in faults:
                continue
            wanted = len(subjects) if fault == CLEAN else count
            for verdict in _planted(pool, fault, subjects, seed, wanted):
                verdicts.append(verdict)
                lines.write(json.dumps(asdict(verdict)) + "\n")
                lines.flush()
                _show(verdict)
    text = table(verdicts)
    (out / TABLE).write_text(text, encoding="utf-8")
    click.echo(text)


def _planted(
    pool: _Pool, fault: str, subjects: Sequence[tuple[str, str]], seed: int, count: int
) -> Iterator[Verdict]:
    """`count` faults of a class, by turns in the artifacts that can have them."""
    able = [subject for subject in subjects if fault in classes(subject[1])]
    random.Random(f"{seed} {fault}").shuffle(able)
    found, turn = 0, 0
    while able and found < count:
        model, kind = able[turn % len(able)]
        verdict = pool.run(Trial(model, kind, fault, seed + turn // len(able)))
        if verdict.planted is None:
            able.remove((model, kind))
            continue
        turn, found = turn + 1, found + 1
        yield verdict


class _Pool:
    """One process, which is replaced where a fault ends it."""

    def __init__(self, out: Path):
        self._out = out
        self._executor = self._started()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def run(self, trial: Trial) -> Verdict:
        try:
            return self._executor.submit(run, trial, self._out, self._out / "scratch").result()
        except BrokenProcessPool:
            self._executor = self._started()
            return Verdict(trial, "it ended the process", ["the process ended"])

    @staticmethod
    def _started() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"))


def _show(verdict: Verdict) -> None:
    state = "caught" if verdict.caught_by else "MISSED"
    name = "named" if verdict.named_right else "unnamed"
    trial = verdict.trial
    print(
        f"{state} {name} {trial.model} {trial.kind} {trial.fault}: {verdict.planted} | "
        f"{', '.join(verdict.caught_by)} | KL {verdict.kl_mean} | {verdict.said[:200]}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
