"""Runs everything that needs CUDA and writes down where it ran.

    python -m benchmarks.cuda [--out dist/cuda] [--model examples/tiny-phi3]

On a machine with an NVIDIA GPU and `phiconv[cuda]` it takes a few minutes: `phiconv doctor`; the
tests marked gpu; the recipes fp16-cuda and int4-cuda, built with `when_missing: require`, so that
nothing falls back to the CPU unnoticed; and the same artifacts once more on the CPU, compared with
CUDA position by position. OUT/cuda.md is what docs/evidence/cuda.md quotes, with verdicts, nodes by
provider, device and driver; beside it lie the reports and the logs. The exit code is 0 when every
part succeeded, and else the first one's that did not.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import click

from phiconv.report.document import read_report_file
from phiconv.report.results import Provenance, RunResult, Validation

ROOT = Path(__file__).parent.parent
RECIPES = ("fp16-cuda", "int4-cuda")
JUNIT = "gpu-tests.xml"
METRICS = ("kl_divergence.mean", "top1_agreement", "perplexity.ratio")


@dataclass(frozen=True)
class Part:
    """A command that was run.

    Attributes:
        name: What for.
        command: As a user types it.
        code: Its exit code.
        output: What it printed.
    """

    name: str
    command: str
    code: int
    output: str


@dataclass(frozen=True)
class Evidence:
    """What was found.

    Attributes:
        parts: The commands, in order.
        builds: The results of the recipes that were built.
        tests: junit.xml of the tests marked gpu, if they were run.
    """

    parts: Sequence[Part]
    builds: Sequence[RunResult]
    tests: str | None

    @property
    def code(self) -> int:
        """0, or the exit code of the first part that failed."""
        return next((part.code for part in self.parts if part.code), 0)


def markdown(evidence: Evidence) -> str:
    """The document: commands, tests, verdicts, nodes, comparison with the CPU, the machine."""
    by_name = {part.name: part for part in evidence.parts}
    lines = ["# CUDA: what ran where", "", "Written by `python -m benchmarks.cuda`.", ""]
    lines += table(
        ("part", "command", "exit code"),
        [(part.name, f"`{part.command}`", str(part.code)) for part in evidence.parts],
    )
    lines += ["", "## Tests marked gpu", "", *_tests(evidence.tests)]
    lines += ["", "## Recipes", ""]
    validations = [(result, item) for result in evidence.builds for item in result.validations]
    lines += _verdicts(validations)
    for result, item in validations:
        lines += ["", f"## Nodes of {result.recipe}", ""]
        lines += _placement(item.measurement.provenance)
    compared = [part for part in evidence.parts if part.name.startswith("compare ")]
    if compared:
        lines += ["", "## The same artifacts on the CPU, and on CUDA", ""]
    for part in compared:
        lines += ["```text", part.output.strip(), "```", ""]
    lines += ["", "## Machine", "", "```text", by_name["doctor"].output.strip(), "```"]
    for part in evidence.parts:
        if part.code:
            tail = part.output.strip().splitlines()[-25:]
            lines += ["", f"## Failed: {part.name}", "", "```text", *tail, "```"]
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _tests(junit: str | None) -> list[str]:
    if junit is None:
        return ["not run"]
    rows = []
    for case in ElementTree.fromstring(junit).iter("testcase"):
        states = [child for child in case if child.tag in ("failure", "error", "skipped")]
        state = states[0].tag if states else "passed"
        reason = (states[0].get("message") or "").splitlines()[:1] if states else []
        where = (case.get("classname") or "").replace("tests.", "", 1)
        seconds = f"{float(case.get('time') or 0):.1f} s"
        rows.append((f"{where}: {case.get('name')}", ": ".join([state, *reason]), seconds))
    return table(("test", "result", "time"), rows) if rows else ["no test was found"]


def _verdicts(validations: Sequence[tuple[RunResult, Validation]]) -> list[str]:
    if not validations:
        return ["none was built"]
    rows = []
    for result, item in validations:
        found = item.measurement.provenance
        metrics = item.measurement.metrics
        figures = [_figure(metrics.get(name)) for name in METRICS]
        runtime = f"{found.runtime} {found.runtime_version}"
        rows.append(
            (result.recipe, item.verdict, *figures, runtime, found.device, found.driver or "")
        )
    return table(("recipe", "verdict", *METRICS, "runtime", "device", "driver"), rows)


def _placement(found: Provenance) -> list[str]:
    """Operators by provider, and the MatMul and attention nodes that are elsewhere."""
    operators = sorted({name for nodes in found.placement.values() for name in nodes})
    rows = [
        (name, *(str(nodes.get(name, 0)) for nodes in found.placement.values()))
        for name in operators
    ]
    total = ("**all**", *(str(sum(nodes.values())) for nodes in found.placement.values()))
    strays = found.strays or ("none",)
    return [
        *table(("operator", *found.placement), [*rows, total]),
        "",
        f"MatMul and attention nodes elsewhere than on {found.provider}: {', '.join(strays)}.",
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def run(name: str, *command: str) -> Part:
    """Runs a Python module's command here, in this checkout, and shows that it does."""
    click.echo(f"{name}: python -m {' '.join(command)}", err=True)
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    shown = " ".join(command).replace(f"{ROOT}{os.sep}", "")
    return Part(name, shown, done.returncode, done.stdout)


def gpu_test_files() -> list[str]:
    """The files with tests marked gpu; others may need packages that such a machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [file for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]
    return [file.relative_to(ROOT).as_posix() for file in marked]


def gather(out: Path, model: str) -> Evidence:
    """Runs every part, whatever becomes of the others, and keeps what each printed."""
    parts = [run("doctor", "phiconv", "doctor")]
    junit = out / JUNIT
    junit.unlink(missing_ok=True)
    # what warns there may not warn here: a warning is no reason to learn nothing
    options = ("-m", "gpu", "-v", "-W", "default", f"--junitxml={junit}")
    parts.append(run("tests", "pytest", *options, *gpu_test_files()))
    builds = []
    for recipe in RECIPES:
        folder = out / recipe
        parts.append(
            run(f"build {recipe}", "phiconv", "build", f"recipes/{recipe}.yaml", "--model", model,
                "--set", "check.when_missing=require", "--out", str(folder))
        )  # fmt: skip
        if parts[-1].code not in (0, 4):
            continue
        builds.append(read_report_file(folder / "report" / "report.json"))
        on_cpu = out / f"{recipe}-on-cpu"
        parts.append(
            run(f"{recipe} on the CPU", "phiconv", "validate", str(folder / "artifact"),
                "--reference", model, "--provider", "cpu", "--out", str(on_cpu))
        )  # fmt: skip
        if parts[-1].code in (0, 4):
            parts.append(run(f"compare {recipe}", "phiconv", "compare", str(on_cpu), str(folder)))
    tests = junit.read_text(encoding="utf-8") if junit.is_file() else None
    return Evidence(parts, builds, tests)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("dist") / "cuda",
    show_default=True,
    help="Where the document, the reports and the logs go.",
)
@click.option("--model", default="examples/tiny-phi3", show_default=True, help="The checkpoint.")
def main(out: Path, model: str) -> None:
    """Run what needs CUDA and write down where it ran."""
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    evidence = gather(out, model)
    for part in evidence.parts:
        log = out / f"{part.name.replace(' ', '-')}.log"
        log.write_text(part.output, encoding="utf-8", newline="\n")
    text = markdown(evidence)
    (out / "cuda.md").write_text(text, encoding="utf-8", newline="\n")
    print(text)
    raise SystemExit(evidence.code)


if __name__ == "__main__":
    main()
