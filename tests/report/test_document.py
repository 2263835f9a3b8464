from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from phiconv.errors import StageError
from phiconv.report.document import (
    measurement_json,
    read_measurement,
    read_report,
    report_json,
    report_schema,
)
from phiconv.report.results import FileRecord, TensorKindRecord
from tests.report.results import every_status, measured, not_run, result, validation

ROOT = Path(__file__).parents[2]


def test_a_report_comes_back_as_it_was() -> None:
    found = every_status()
    again = read_report(report_json(found), "report.json")
    assert report_json(again) == report_json(found)
    assert again.validations[0] == found.validations[0]
    assert [v.verdict for v in again.validations] == [v.verdict for v in found.validations]


def test_verdicts_come_first_and_values_that_are_not_finite_are_null() -> None:
    document = json.loads(report_json(every_status()), parse_constant=pytest.fail)
    assert list(document)[:3] == ["schema", "status", "verdicts"]
    assert document["schema"] == 1
    assert document["status"] == "failed"
    assert [verdict["status"] for verdict in document["verdicts"]] == [
        "passed",
        "failed",
        "not_run",
        "ungated",
    ]
    assert document["verdicts"][0]["text"] == (
        "passed on CPUExecutionProvider, target DmlExecutionProvider not present"
    )
    bad = document["result"]["validations"][1]
    assert bad["measurement"]["metrics"]["perplexity.ratio"] is None
    assert document["result"]["stages"][1]["facts"]["nan"] is None


def test_the_schema_holds_for_reports_and_refuses_others() -> None:
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for found in (every_status(), result()):
        validator.validate(json.loads(report_json(found)))
    broken = json.loads(report_json(every_status()))
    broken["result"]["validations"][0]["measurement"]["status"] = "fine"
    assert not validator.is_valid(broken)
    broken = json.loads(report_json(every_status()))
    del broken["verdicts"]
    assert not validator.is_valid(broken)


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    assert committed == report_schema(), "run: phiconv schema report > docs/report.schema.json"


@pytest.mark.parametrize("status", ["passed", "failed", "not_run", "ungated"])
def test_a_builds_status_is_that_of_its_worst_validation(status: str) -> None:
    good, bad, skipped, free = every_status().validations
    chosen = {
        "failed": (good, bad, skipped),
        "not_run": (good, skipped, free),
        "passed": (good, free),
        "ungated": (free,),
    }[status]
    assert result(*chosen).status == status
    assert result().status == "ungated"


def test_a_measurement_comes_back_as_it_was(tmp_path: Path) -> None:
    for found in (measured(), not_run()):
        (tmp_path / "measurement.json").write_text(measurement_json(found), encoding="utf-8")
        assert read_measurement(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "status: Field required"),
        ("not json", "Invalid JSON"),
        ('{"status": "fine"}', "status: Input should be 'measured' or 'not_run'"),
    ],
)
def test_what_is_no_measurement_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(StageError, match="no measurement"):
        read_measurement(tmp_path)
    (tmp_path / "measurement.json").write_text(content, encoding="utf-8")
    with pytest.raises(StageError) as caught:
        read_measurement(tmp_path)
    assert message in caught.value.message
    assert str(tmp_path) in str(caught.value)


def test_a_report_of_another_schema_version_is_refused() -> None:
    document = json.loads(report_json(result(validation("check", measured()))))
    with pytest.raises(StageError, match="schema version 1: schema: Input should be 1"):
        read_report(json.dumps(document | {"schema": 2}), "report.json")


def test_a_histogram_and_positions_that_were_edited_are_still_data() -> None:
    found = replace(measured(), kl_histogram=None, kl_by_position=None)
    text = report_json(result(validation("check", found)))
    assert read_report(text, "report.json").validations[0].measurement == found


def test_bits_and_bytes_count_everything() -> None:
    scales = 2 * 1024 // 32
    assert TensorKindRecord("mlp", "int4 block 32", 1024, 1024 // 2 + scales).bits == 4.5
    assert TensorKindRecord("mlp", "int4 block 32", 0, 0).bits == 0
    files = (FileRecord("a", 700, "sha256:0"), FileRecord("b", 42, "sha256:1"))
    assert replace(result(), files=files).size_bytes == 742
