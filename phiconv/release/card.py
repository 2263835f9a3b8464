"""README.md of a release: a model card whose every figure was measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phiconv import __version__
from phiconv.metrics import known_error
from phiconv.release.admission import LLAMA_CPP
from phiconv.release.licence import card_licence, licence_text
from phiconv.release.plan import Item, ReleasePlan
from phiconv.report import text
from phiconv.report.results import TensorKindRecord, Validation
from phiconv.stages.stage import GGUF, ONNX

PACKAGES = {
    "cpu": "onnxruntime-genai",
    "cuda": "onnxruntime-genai-cuda",
    "dml": "onnxruntime-genai-directml",
}
_RUNTIMES = {ONNX: "ONNX Runtime GenAI", GGUF: LLAMA_CPP}
_NOT_MEASURED = "–"


@dataclass(frozen=True)
class Row:
    """One measurement of one artifact, as the table shows it."""

    path: str
    report: str
    size: str
    bits: str
    where: str
    verdict: str
    kl_divergence: str
    top1: str
    perplexity: str


@dataclass(frozen=True)
class Limit:
    """A known limit, and the artifacts that it holds for."""

    statement: str
    paths: tuple[str, ...]


def card_markdown(plan: ReleasePlan) -> str:
    """The card: front matter, artifacts, how to run them, provenance, known limits, licence."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phiconv.release", ""),
        autoescape=False,  # it is Markdown; the filter md escapes what others wrote
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape
    onnx = [item for item in plan.items if item.output.kind == ONNX]
    return environment.get_template("card.md.j2").render(
        front_matter=_yaml(front_matter(plan)),
        plan=plan,
        version=__version__,
        rows=[row for item in plan.items for row in _rows(item)],
        tokens=_token_sets(plan),
        calibrations=sorted({pair for item in plan.items for pair in item.calibrations}),
        onnx=onnx,
        first=next((item for item in onnx if item.output.target == "cpu"), onnx[0])
        if onnx
        else None,
        gguf=[item for item in plan.items if item.output.kind == GGUF],
        packages=PACKAGES,
        tools=sorted(_tools(plan).items()),
        limits=list(_limits(plan)),
        waived=[item for item in plan.items if item.waivers],
        licence=licence_text(plan.terms),
        licence_files=sorted(plan.terms.files),
    )


def front_matter(plan: ReleasePlan) -> dict[str, Any]:
    """The metadata that the Hub reads."""
    kinds = {item.output.kind for item in plan.items}
    library = "onnxruntime-genai" if ONNX in kinds else "gguf"
    tags = ["onnx", "onnxruntime", "onnxruntime-genai"] if ONNX in kinds else []
    tags += ["gguf", LLAMA_CPP] if GGUF in kinds else []
    architecture = plan.checkpoint.architecture or ""
    tags += [architecture.removesuffix("ForCausalLM").lower()] if architecture else []
    base = {"base_model": plan.base_model, "base_model_relation": "quantized"}
    return {
        **card_licence(plan.terms),
        **(base if plan.base_model else {}),
        **({"language": list(plan.terms.languages)} if plan.terms.languages else {}),
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [*tags, "phiconv"],
    }


def escape(value: object) -> str:
    """Text that Markdown and HTML take literally, in one table cell."""
    found = str(value)
    for character in "\\`*_[]<>|":
        found = found.replace(character, f"\\{character}")
    return " ".join(found.split())


def _yaml(document: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def _rows(item: Item) -> Iterator[Row]:
    validations: Iterable[Validation | None] = item.output.result.validations or (None,)
    for validation in validations:
        metrics = validation.measurement.metrics if validation else {}
        provenance = validation.measurement.provenance if validation else None
        top1 = metrics.get("top1_agreement")
        spread = known_error(metrics, "top1_agreement")
        yield Row(
            path=item.path,
            report=f"{item.reports}/report.md",
            size=text.size(item.size_bytes),
            bits=_bits(item.output.result.tensor_kinds),
            where=(provenance.provider if provenance else None) or "not run",
            verdict=validation.verdict if validation else "not validated",
            kl_divergence=_figure(metrics, "kl_divergence.mean"),
            top1=_NOT_MEASURED if top1 is None else _percentage(top1, spread),
            perplexity=_figure(metrics, "perplexity.ratio"),
        )


def _figure(metrics: Mapping[str, float | None], name: str) -> str:
    value = metrics.get(name)
    return _NOT_MEASURED if value is None else text.with_error(value, known_error(metrics, name))


def _percentage(share: float, error: float | None) -> str:
    return f"{100 * share:.1f} %" if error is None else f"{100 * share:.1f} ± {100 * error:.1f} %"


def _bits(kinds: Iterable[TensorKindRecord]) -> str:
    """Mean bits a weight; rotary caches are no weights."""
    weights = [kind for kind in kinds if kind.kind != "rotary"]
    parameters = sum(kind.parameters for kind in weights)
    if not parameters:
        return _NOT_MEASURED
    return f"{8 * sum(kind.size_bytes for kind in weights) / parameters:.2f}"


def _token_sets(plan: ReleasePlan) -> list[str]:
    """The texts that were measured on."""
    records = [
        validation.measurement.tokens
        for item in plan.items
        for validation in item.output.result.validations
    ]
    return sorted(
        {
            f"{record.name}: {record.windows} windows of {record.window_length} tokens, "
            f"text {record.text_digest}, ids {record.ids_digest}"
            for record in records
        }
    )


def _tools(plan: ReleasePlan) -> dict[str, str]:
    """Every tool's version; several where the builds differ."""
    found: dict[str, set[str]] = {}
    for item in plan.items:
        for name, version in item.output.result.tools.items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(versions)) for name, versions in found.items()}


def _limits(plan: ReleasePlan) -> Iterator[Limit]:
    """What was not run, where runtimes leave Hugging Face's results, and what checks noted."""
    for kind in (_waived, _stated, _noted):
        found: dict[str, list[str]] = {}
        for item in plan.items:
            for statement in dict.fromkeys(kind(item)):
                found.setdefault(statement, []).append(item.path)
        for statement, paths in found.items():
            yield Limit(statement, tuple(paths))


def _waived(item: Item) -> Iterator[str]:
    for waiver in item.waivers:
        yield f"The gates were not run on the target provider ({waiver.provider}): {waiver.verdict}"


def _stated(item: Item) -> Iterator[str]:
    for validation in item.output.result.validations:
        for limit in validation.measurement.known_limits:
            since = f"From position {limit.from_position}, in" if limit.from_position else "In"
            yield f"{since} {limit.runtime}: {limit.statement}"


def _noted(item: Item) -> Iterator[str]:
    for validation in item.output.result.validations:
        for check in validation.measurement.checks:
            if check.state in ("warnings", "not_checked"):
                said = check.findings[0] if len(check.findings) == 1 else check.summary
                said = said.removeprefix("warning: ")
                yield f"{_RUNTIMES[item.output.kind]}, {check.name}: {said}"
