"""The model card: what the Hub reads, what people read, and what they run."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

from phiconv.checkpoint.licence import ModelTerms
from phiconv.release import ReleaseOptions, ReleasePlan, plan_release
from phiconv.release.card import card_markdown, front_matter
from phiconv.release.licence import card_licence, cyclonedx_licences
from phiconv.release.provenance import statement_json
from phiconv.report.results import Check, KnownLimit, RunResult
from phiconv.units import size_text
from tests.release.builds import CPU, FP16, GGUF, copied, edit_result


@pytest.fixture(scope="module")
def card(released: Path) -> str:
    return (released / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plan(dist: dict[str, Path]) -> ReleasePlan:
    return plan_release(list(dist.values()), ReleaseOptions(allow=("not-run:cuda",)))


def html(card: str) -> str:
    body = ModelCard(card).text
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(body))


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_hub_reads_the_front_matter(card: str) -> None:
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    assert data.license == "mit" and data.license_link == "LICENSE"
    assert data.base_model == "microsoft/Phi-3-mini-4k-instruct"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert data.language == ["en", "de"]
    assert data.library_name == "onnxruntime-genai"
    assert data.pipeline_tag == "text-generation"
    assert {"onnx", "gguf", "phi3"} <= set(data.tags or ())
    again = ModelCardData(**data.to_dict()).to_yaml()
    assert yaml.safe_load(again) == yaml.safe_load(card.split("---\n")[1])


def test_the_table_shows_what_was_measured(card: str, plan: ReleasePlan) -> None:
    rows = [line for line in card.splitlines() if line.startswith("| [")]
    assert len(rows) == 3
    for item, row in zip(plan.items, rows, strict=True):
        validation = item.output.result.validations[0]
        metrics = validation.measurement.metrics
        top1 = metrics["top1_agreement"]
        assert top1 is not None
        assert validation.verdict.replace("_", "\\_") in row
        error = metrics["top1_agreement.standard_error"]
        assert error is not None
        assert f"| {100 * top1:.1f} ± {100 * error:.1f} % |" in row
        assert f" ± {metrics['kl_divergence.standard_error']:.2g} |" in row
        assert f" ± {metrics['perplexity.ratio_standard_error']:.2g} |" in row
        assert f"{item.reports}/report.md" in row
        _, _, size, bits, where, _, divergence, _, ratio, _ = re.split(r" ?(?<!\\)\| ?", row)
        assert float(divergence.split()[0]) == pytest.approx(
            metrics["kl_divergence.mean"], rel=5e-3
        )
        assert float(ratio.split()[0]) == pytest.approx(metrics["perplexity.ratio"], rel=5e-3)
        assert where == validation.measurement.provenance.provider
        weights = [kind for kind in item.output.result.tensor_kinds if kind.kind != "rotary"]
        stored, parameters = (
            sum(getattr(kind, name) for kind in weights) for name in ("size_bytes", "parameters")
        )
        assert float(bits) == pytest.approx(8 * stored / parameters, abs=0.005)
        assert size == size_text(sum(count for _, count in item.output.files.values()))


def test_what_was_not_run_stands_at_the_head_and_among_the_limits(card: str) -> None:
    verdict = "passed on CPUExecutionProvider, target CUDAExecutionProvider not present"
    head, limits = card.split("## Artifacts")[0], card.split("## Known limits")[1]
    assert f"`cuda/cuda-fp16`, for cuda: {verdict}" in head
    assert verdict in limits and "`cuda/cuda-fp16`" in limits


def test_it_renders(card: str) -> None:
    page = html(card)
    assert page.count("<table>") == 4
    assert len(re.findall(r"<tr>", page.split("</table>")[0])) == 4
    assert "<blockquote>" in page
    assert not re.search(r"\{\{|\{%|\| ---|None", page)


def test_its_links_lead_to_files(card: str, released: Path) -> None:
    links = [link for link in re.findall(r'<a href="([^"]+)"', html(card)) if "://" not in link]
    assert "reports/index.html" in links and "LICENSE" in links
    for link in links:
        assert (released / link).is_file(), link


def test_its_snippets_are_programs_and_name_the_artifacts(card: str, released: Path) -> None:
    genai, llama = map(ast.parse, snippets(card))
    paths = {
        node.value
        for node in (*ast.walk(genai), *ast.walk(llama))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "/" in node.value
    }
    assert paths == {
        "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4",
        "gguf/Phi-3-mini-4k-instruct-q4.gguf",
    }
    assert all((released / path).exists() for path in paths)


def test_known_limits_of_the_runtime_are_listed(dist: dict[str, Path], tmp_path: Path) -> None:
    limit = KnownLimit("llama.cpp", "attends to all | of it", 2047)

    def limited(result: RunResult) -> RunResult:
        (found,) = result.validations
        note = Check("graph", "warnings", "1 warning", ("no window in layer 0",))
        measurement = replace(found.measurement, known_limits=(limit,), checks=(note,))
        return replace(result, validations=(replace(found, measurement=measurement),))

    output = copied(dist[GGUF], tmp_path / "out")
    edit_result(output, limited)
    card = card_markdown(plan_release([output], ReleaseOptions()))
    statement = "- From position 2047, in llama.cpp: attends to all \\| of it"
    assert f"{statement} (`gguf/Phi-3-mini-4k-instruct-q4.gguf`)" in card
    assert "- llama.cpp, graph: no window in layer 0" in card


def test_what_was_calibrated_on_is_named(dist: dict[str, Path], tmp_path: Path) -> None:
    digest = "sha256:" + "5" * 64

    def calibrated(result: RunResult) -> RunResult:
        first, *rest = result.stages
        return replace(result, stages=(replace(first, facts={"ids_digest": digest}), *rest))

    output = copied(dist[CPU], tmp_path / "out")
    edit_result(output, calibrated)
    plan = plan_release([output], ReleaseOptions())
    assert f"| calibrated on | export-onnx: token ids {digest} |" in card_markdown(plan)
    statement = json.loads(statement_json(plan, {}))
    dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {"name": "token ids of export-onnx", "digest": {"sha256": "5" * 64}} in dependencies


def test_gguf_alone(dist: dict[str, Path]) -> None:
    plan = plan_release([dist[GGUF]], ReleaseOptions())
    assert plan.name == "Phi-3-tiny-gguf"
    assert front_matter(plan)["library_name"] == "gguf"
    card = card_markdown(plan)
    assert "onnx" not in card.split("## Provenance")[0].lower()
    assert len(snippets(card)) == 1


def test_onnx_alone_and_titled(dist: dict[str, Path]) -> None:
    options = ReleaseOptions(name="Tiny | *Phi*", allow=("not-run:CUDAExecutionProvider",))
    card = card_markdown(plan_release([dist[FP16]], options))
    assert "# Tiny \\| \\*Phi\\*" in card
    assert "llama" not in card.lower()
    assert "pip install onnxruntime-genai-cuda" in card
    assert 'else "cuda/cuda-fp16"' in card
    assert "base_model" not in card.split("---\n")[1], "a local folder has no Hub id"


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (ModelTerms(), {"license": "unknown"}),
        (ModelTerms(license="mit"), {"license": "mit"}),
        (ModelTerms(license="psf-2.0"), {"license": "other", "license_name": "psf-2.0"}),
        (
            ModelTerms(license="other", license_name="phi", license_link="https://x.example"),
            {"license": "other", "license_name": "phi", "license_link": "https://x.example"},
        ),
        (
            ModelTerms(files={"LICENSE.txt": "Be good."}),
            {"license": "other", "license_link": "LICENSE.txt"},
        ),
    ],
)
def test_licences_that_the_hub_does_not_know(terms: ModelTerms, expected: dict[str, str]) -> None:
    assert card_licence(terms) == expected
    ModelCardData(**expected)


def test_licences_of_a_bill_of_materials() -> None:
    assert cyclonedx_licences(ModelTerms(license="mit")) == [{"license": {"id": "MIT"}}]
    assert cyclonedx_licences(ModelTerms(license="x", license_name="Y")) == [
        {"license": {"name": "Y"}}
    ]
    assert cyclonedx_licences(ModelTerms()) == []


def test_the_licence_section_says_what_there_is(plan: ReleasePlan) -> None:
    def section(terms: ModelTerms) -> str:
        return card_markdown(replace(plan, terms=terms)).split("## Licence")[1]

    assert "[LICENSE](LICENSE), [NOTICE.md](NOTICE.md)" in section(plan.terms)
    assert "Its card says: psf-2.0." in section(ModelTerms(license="psf-2.0"))
    assert "Nor does its card state one" in section(ModelTerms())
