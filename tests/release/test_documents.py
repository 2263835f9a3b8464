"""Bill of materials, provenance and checksums, by the rules of their formats."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from phiconv.errors import RecipeError
from phiconv.report.document import read_report_file
from phiconv.report.results import RunResult
from phiconv.verify.listing import list_folder
from tests.release.builds import CPU, GGUF, LICENCE, NOTICE, TINY, release


def document(released: Path, name: str) -> Any:
    return json.loads((released / name).read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    names = list_folder(folder).sizes
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_sha256sums_lists_everything_but_itself(released: Path) -> None:
    lines = (released / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("  ", 1)[::-1] for line in lines)
    expected = digests(released)
    del expected["SHA256SUMS"]
    assert found == expected
    assert list(found) == sorted(found)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum")
def test_sha256sum_checks_it(released: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    done = subprocess.run(command, cwd=released, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_licence_and_notice_are_the_models(released: Path) -> None:
    assert (released / "LICENSE").read_bytes() == LICENCE.encode()
    assert (released / "NOTICE.md").read_bytes() == NOTICE.encode()


def test_reports_and_their_index(released: Path) -> None:
    index = (released / "reports" / "index.html").read_text(encoding="utf-8")
    for name in ("cpu-int4-rtn-block-32-acc-level-4", "cuda-fp16", "gguf-q4_k_m"):
        recipe = f"phi-3-mini-4k-instruct-{name}"
        assert f'href="{recipe}/report.html"' in index
        assert {path.name for path in (released / "reports" / recipe).iterdir()} == {
            "report.html",
            "report.json",
            "report.md",
            "junit.xml",
            "positions.npz",
        }


def fp16_result(released: Path) -> RunResult:
    recipe = "phi-3-mini-4k-instruct-cuda-fp16"
    return read_report_file(released / "reports" / recipe / "report.json")


def source_digest(released: Path) -> str:
    """BLAKE3 of the model's weights, as the report has it."""
    return fp16_result(released).checkpoint.files["model.safetensors"].removeprefix("blake3:")


def test_the_bill_of_materials_is_valid_cyclonedx(released: Path) -> None:
    text = (released / "sbom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_bill_of_materials_names_models_files_and_packages(released: Path) -> None:
    found = document(released, "sbom.cdx.json")
    components = {item["bom-ref"]: item for item in found["components"]}
    source = components["source"]
    assert source["purl"] == "pkg:huggingface/microsoft/Phi-3-mini-4k-instruct"
    assert source["licenses"] == [{"license": {"id": "MIT"}}]
    weights = next(item for item in source["components"] if item["name"] == "model.safetensors")
    assert weights["hashes"] == [{"alg": "BLAKE3", "content": source_digest(released)}]
    artifact = components["artifact/phi-3-mini-4k-instruct-cuda-fp16"]
    metrics = artifact["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [metric["type"] for metric in metrics] == [
        "kl_divergence.mean",
        "top1_agreement",
        "perplexity.ratio",
    ]
    measured = fp16_result(released).validations[0].measurement.metrics
    assert [float(metric["value"]) for metric in metrics] == [
        measured[metric["type"]] for metric in metrics
    ]
    torch = next(item for item in found["components"] if item["name"] == "torch")
    assert torch["type"] == "library" and torch["licenses"]
    assert "+" not in torch["purl"]
    references = {item["ref"]: item["dependsOn"] for item in found["dependencies"]}
    assert "source" in references["artifact/phi-3-mini-4k-instruct-cuda-fp16"]
    known = {*components, "release"}
    assert {ref for refs in references.values() for ref in refs} <= known


def test_the_statement_is_slsa_provenance(released: Path) -> None:
    statement = document(released, "provenance.intoto.json")
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    expected = digests(released)
    del expected["SHA256SUMS"], expected["provenance.intoto.json"]
    subjects = {item["name"]: item["digest"]["sha256"] for item in statement["subject"]}
    assert subjects == expected
    definition = statement["predicate"]["buildDefinition"]
    assert set(definition) == {
        "buildType",
        "externalParameters",
        "internalParameters",
        "resolvedDependencies",
    }
    artifacts = {item["path"]: item for item in definition["externalParameters"]["artifacts"]}
    assert artifacts["cuda/cuda-fp16"]["allowed"] == ["not-run:cuda"]
    gguf = artifacts["gguf/Phi-3-mini-4k-instruct-q4.gguf"]
    assert gguf["recipe"]["stages"][0]["with"]["file_type"] == "Q4_K_M"
    assert gguf["allowed"] == []
    dependencies = {item["name"]: item for item in definition["resolvedDependencies"]}
    assert dependencies["model.safetensors"]["digest"] == {"blake3": source_digest(released)}
    assert len(dependencies["tokens default"]["digest"]["sha256"]) == 64
    assert dependencies["numpy"]["uri"].startswith("pkg:pypi/numpy@")
    assert statement["predicate"]["runDetails"]["builder"]["id"] == "urn:phiconv:local"
    assert "metadata" not in statement["predicate"]["runDetails"], "it says no time"


def test_the_same_outputs_give_the_same_release(
    dist: dict[str, Path], tmp_path: Path, release_home: Path
) -> None:
    places = [dist[CPU], dist[GGUF]]
    one = release(places, tmp_path / "one", release_home)
    other = release(places[::-1], tmp_path / "sub" / "other", release_home)
    assert digests(one) == digests(other)
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(one.glob("*.*")))
    for path in (tmp_path, TINY.parent):
        assert str(path) not in text


def test_source_date_epoch_gives_the_time(
    dist: dict[str, Path],
    tmp_path: Path,
    release_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    made = release([dist[GGUF]], tmp_path / "to", release_home)
    time = "2023-11-14T22:13:20Z"
    assert document(made, "sbom.cdx.json")["metadata"]["timestamp"] == time
    details = document(made, "provenance.intoto.json")["predicate"]["runDetails"]
    assert details["metadata"] == {"finishedOn": time}
    text = (made / "sbom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "today")
    with pytest.raises(RecipeError, match="SOURCE_DATE_EPOCH"):
        release([dist[GGUF]], tmp_path / "again", release_home)
    assert not (tmp_path / "again").exists()
