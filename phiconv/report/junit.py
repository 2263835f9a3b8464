"""junit.xml: one test case a gate and provider, for the test panels of CI systems.

The built-in gates on what was checked are test cases like the recipe's.

The elements and attributes are those that the strictest of the common JUnit schemas asks for (the
Ant report's), in its order, so every consumer takes the file.
"""

from __future__ import annotations

from xml.etree import ElementTree

from phiconv.report.results import GateResult, RunResult, Validation


def junit_xml(result: RunResult) -> str:
    """junit.xml of a build: a suite a validate stage, a test case a gate.

    A failed gate is a failure; a validation that did not run, and a check that could not be made,
    is a skipped test case.
    """
    root = ElementTree.Element("testsuites")
    for index, validation in enumerate(result.validations):
        root.append(_suite(result, validation, index))
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}\n'


def _suite(result: RunResult, validation: Validation, index: int) -> ElementTree.Element:
    skipped = _skipped(validation)
    failed = sum(not gate.passed for gate in validation.gates)
    seconds = next((s.wall_s for s in result.stages if s.id == validation.stage), None) or 0.0
    suite = ElementTree.Element(
        "testsuite",
        {
            "name": f"{result.recipe}.{validation.stage}",
            "package": result.recipe,
            "id": str(index),
            # the schema wants no time zone; `created` is UTC
            "timestamp": result.created[:19],
            "hostname": "localhost",
            "tests": str(len(skipped) + len(validation.gates)),
            "failures": str(failed),
            "errors": "0",
            "skipped": str(len(skipped)),
            "time": f"{seconds:.3f}",
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(result, validation).items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": value})
    classname = f"{result.recipe}.{validation.stage}"
    for name, reason in skipped.items():
        case = _case(suite, classname, name)
        ElementTree.SubElement(case, "skipped", {"message": reason})
    for gate in validation.gates:
        case = _case(suite, classname, _name(gate))
        if not gate.passed:
            attributes = {"message": str(gate), "type": "GateError"}
            lines = [str(gate), *_findings(validation, gate)]
            ElementTree.SubElement(case, "failure", attributes).text = "\n".join(lines)
    ElementTree.SubElement(suite, "system-out").text = validation.verdict
    ElementTree.SubElement(suite, "system-err")
    return suite


def _findings(validation: Validation, gate: GateResult) -> list[str]:
    """What the check found that a gate's metric counts."""
    return [
        finding
        for check in validation.measurement.checks
        if gate.metric in check.metrics
        for finding in check.findings
    ]


def _skipped(validation: Validation) -> dict[str, str]:
    """Name and reason of what could not be tried here."""
    measurement = validation.measurement
    skipped = {
        f"check {check.name}": check.summary
        for check in measurement.checks
        if check.state == "not_checked"
    }
    if measurement.status == "not_run":
        provenance = measurement.provenance
        skipped[f"provider {provenance.target_provider}"] = provenance.where
    return skipped


def _case(suite: ElementTree.Element, classname: str, name: str) -> ElementTree.Element:
    # one pass measures all gates, so no time belongs to a single one: it stands on the suite
    attributes = {"classname": classname, "name": name, "time": "0.000"}
    return ElementTree.SubElement(suite, "testcase", attributes)


def _name(gate: GateResult) -> str:
    return f"{gate.metric} {gate.bound} {gate.limit:.6g} on {gate.provider}"


def _properties(result: RunResult, validation: Validation) -> dict[str, str]:
    provenance = validation.measurement.provenance
    return {
        "checkpoint": f"{result.checkpoint.source} {result.checkpoint.digest}",
        "artifact": validation.artifact,
        "tokens": str(validation.measurement.tokens),
        "target_provider": provenance.target_provider,
        "provider": provenance.provider or "none",
        "runtime": f"{provenance.runtime} {provenance.runtime_version}".strip(),
    }
