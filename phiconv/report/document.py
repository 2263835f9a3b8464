"""The JSON forms: report.json and measurement.json, written and read back with their types.

report.json is `ReportDocument`: the verdicts first, then the whole `RunResult`. Its schema
(docs/report.schema.json) is generated from the types. A change that breaks readers raises
`REPORT_SCHEMA`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from phiconv.errors import StageError
from phiconv.report.results import Measurement, RunResult, Status

T = TypeVar("T")

REPORT_SCHEMA: Literal[1] = 1
MEASUREMENT_FILE = "measurement.json"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one validate stage, in one line."""

    stage: str
    status: Status
    text: str


@dataclass(frozen=True)
class ReportDocument:
    """report.json.

    Attributes:
        schema: Version of this format.
        status: The build's: `failed` if any validation failed, else `not_run` if any was not run,
            else `passed`; `ungated` when nothing was judged.
        verdicts: One a validate stage.
        result: Everything the build found out.
    """

    schema: Literal[1]
    status: Status
    verdicts: tuple[Verdict, ...]
    result: RunResult

    @classmethod
    def of(cls, result: RunResult) -> ReportDocument:
        """The document of a result."""
        verdicts = tuple(
            Verdict(validation.stage, validation.status, validation.verdict)
            for validation in result.validations
        )
        return cls(REPORT_SCHEMA, result.status, verdicts, result)


def report_json(result: RunResult) -> str:
    """report.json of a build."""
    return _dump(ReportDocument.of(result))


def read_report(text: str, where: str) -> RunResult:
    """The result that a report.json holds.

    Raises:
        StageError: It is not a report of this schema version.
    """
    return _parse(ReportDocument, text, where, "report").result


def read_report_file(file: Path) -> RunResult:
    """The result that a file holds.

    Raises:
        StageError: It cannot be read, or is not a report of this schema version.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"the report cannot be read: {error}", where=str(file)) from error
    return read_report(text, str(file))


def report_schema() -> dict[str, Any]:
    """JSON schema of report.json, generated from the types."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(ReportDocument).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def measurement_json(measurement: Measurement) -> str:
    """measurement.json of a validate stage."""
    return _dump(measurement)


def read_measurement(folder: Path) -> Measurement:
    """The measurement in an artifact of kind `measurement`.

    Raises:
        StageError: The file is missing or is not a measurement.
    """
    file = folder / MEASUREMENT_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise StageError(f"no measurement: {error}", where=str(file)) from error
    return _parse(Measurement, text, str(file), "measurement")


def _dump(value: Any) -> str:
    plain = _plain(dataclasses.asdict(value))
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: None, whatever container they are in."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _parse(kind: type[T], text: str, where: str, name: str) -> T:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise StageError(
            f"not a {name} of schema version {REPORT_SCHEMA}: {place}: {first['msg']}",
            where=where,
            remedy="it was made by another version of phiconv: build or validate again",
        ) from error
