"""Commands that read reports: `phiconv compare` and `phiconv index`."""

from __future__ import annotations

from pathlib import Path

import click

from phiconv.cli.annotations import annotate_failures
from phiconv.cli.options import json_option, print_json, verbose_option
from phiconv.cli.outcomes import print_lines


@click.command()
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--max-regression",
    "regressions",
    multiple=True,
    metavar="METRIC=V",
    help="How much worse than the baseline a metric may be: 0.002, or 10% of the baseline. "
    "Repeatable. [default: kl_divergence.mean by 10% or 0.0001, whichever is more, top1_agreement "
    "and perplexity.ratio by 0.01, and no more faults found by checks]",
)
@click.option(
    "--gates",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file that maps metrics to max_regression, instead of the defaults, and to min and "
    "max for the candidate alone.",
)
@json_option
@verbose_option
def compare(
    baseline: Path,
    candidate: Path,
    regressions: tuple[str, ...],
    gates: Path | None,
    as_json: bool,
) -> int:
    """Show whether an artifact is worse than another.

    BASELINE and CANDIDATE are report.json files, folders with one, or output folders of `phiconv
    build` and `phiconv validate`; the baseline is such as the last release. Both must have been
    measured on the same tokens against the same reference. With positions.npz beside both reports
    the errors of the differences are paired, which tells far smaller ones from noise.
    """
    from dataclasses import asdict

    from phiconv.allowances import regression_gates
    from phiconv.compare import compare as compare_reports
    from phiconv.compare import open_report
    from phiconv.summary import comparison_lines

    allowances, limits = regression_gates(gates, regressions)
    found = compare_reports(open_report(baseline), open_report(candidate), allowances, limits)
    if as_json:
        print_json(
            {
                "baseline": str(found.baseline.file),
                "candidate": str(found.candidate.file),
                "pairs": [
                    {
                        "stages": [pair.baseline.stage, pair.candidate.stage],
                        "verdicts": [pair.baseline.verdict, pair.candidate.verdict],
                        "tokens": asdict(pair.candidate.measurement.tokens),
                        "errors": {"kind": pair.errors.kind, "about": pair.errors.about},
                        "metrics": [asdict(row) for row in pair.rows],
                        "gates": [asdict(gate) for gate in pair.gates],
                    }
                    for pair in found.pairs
                ],
                "not_run": list(found.not_run),
                "failures": found.failures,
            }
        )
    else:
        print_lines(comparison_lines(found))
    annotate_failures(found.candidate.result.recipe, [*found.failures, *found.not_run])
    return found.exit_code


@click.command()
@click.argument(
    "places",
    nargs=-1,
    required=True,
    metavar="DIST...",
    type=click.Path(path_type=Path),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The page [default: index.html in the folder that holds all DIST].",
)
@verbose_option
def index(places: tuple[Path, ...], out: Path | None) -> None:
    """Write a page over several builds.

    DIST are output folders of `phiconv build` and `phiconv validate`, or folders that hold such.
    The page plots KL divergence against size and links to the reports.
    """
    from phiconv.index import default_page, find_reports, read_reports, write_index

    results = read_reports(find_reports(places))
    page = out or default_page(places)
    write_index(page, results)
    click.echo(f"{page}: {len(results)} report{'' if len(results) == 1 else 's'}")
