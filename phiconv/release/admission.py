"""Which outputs may be released: every gate passed on the provider that the artifact is for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from phiconv.errors import GateError, PhiconvError, RecipeError
from phiconv.release.output import Output
from phiconv.report.results import Validation
from phiconv.runtimes.providers import PROVIDERS

LLAMA_CPP = "llama.cpp"
NOT_RUN = "not-run"
_NAMES: dict[str, str] = {**dict(PROVIDERS.items()), LLAMA_CPP: LLAMA_CPP}


@dataclass(frozen=True)
class Waiver:
    """A gate that was not run on its target, and that the release was allowed to lack.

    Attributes:
        provider: The target by its short name, as in `--allow not-run:dml`.
        verdict: What was found out instead, in the validation's own words.
    """

    provider: str
    verdict: str


def parse_allowances(texts: Sequence[str]) -> frozenset[str]:
    """The short names of providers in `--allow not-run:<provider>`.

    Raises:
        RecipeError: An exception that there is not.
    """
    found = set()
    for text in texts:
        kind, _, name = text.partition(":")
        short = _short(name)
        if kind != NOT_RUN or short not in _NAMES:
            known = ", ".join(f"{NOT_RUN}:{name}" for name in _NAMES)
            raise RecipeError(
                f"there is no exception {text!r}", where="--allow", remedy=f"known are {known}"
            )
        found.add(short)
    return frozenset(found)


def admit(
    output: Output, allowed: Collection[str]
) -> tuple[tuple[Waiver, ...], list[PhiconvError]]:
    """Whether an output may be released.

    Args:
        output: The output.
        allowed: Short names of providers on which gates need not have been run.

    Returns:
        The exceptions it needs of those allowed, and why it may not be released.
    """
    errors: list[PhiconvError] = []
    waivers: list[Waiver] = []
    lacking: list[tuple[str, str]] = []
    if not output.result.validations:
        lacking.append((output.target, "built without validation"))
    for validation in output.result.validations:
        target = _short(validation.measurement.provenance.target_provider)
        if validation.status == "failed":
            errors.append(_failed(output, validation))
        elif validation.status == "ungated":
            errors.append(_ungated(output, validation))
        elif not _ran_on_target(validation):
            lacking.append((target, validation.verdict))
    for target, verdict in lacking:
        if target in allowed:
            waivers.append(Waiver(target, verdict))
        else:
            errors.append(_not_run(output, target, verdict))
    return tuple(waivers), errors


def _ran_on_target(validation: Validation) -> bool:
    provenance = validation.measurement.provenance
    return validation.status == "passed" and provenance.provider == provenance.target_provider


def _short(name: str) -> str:
    return next((short for short, long in _NAMES.items() if name in (short, long)), name)


def _failed(output: Output, validation: Validation) -> GateError:
    failures = "; ".join(str(gate) for gate in validation.gates if not gate.passed)
    return GateError(
        f"{output.name}: {validation.verdict}: {failures}",
        where=str(output.folder),
        remedy="leave it out of the release, or correct its recipe; `phiconv diagnose` finds out "
        "where the error comes from",
    )


def _ungated(output: Output, validation: Validation) -> GateError:
    return GateError(
        f"{output.name}: {validation.stage} was measured without gates",
        where=str(output.folder),
        remedy="give the recipe gates, then build again: nothing has to be recomputed",
    )


def _not_run(output: Output, target: str, verdict: str) -> GateError:
    return GateError(
        f"{output.name}: its gates were not run on {_NAMES.get(target, target)}: {verdict}",
        where=str(output.folder),
        remedy="build it where that is present, or allow the exception, which the model card then "
        f"shows: --allow {NOT_RUN}:{target}",
    )
