from __future__ import annotations

import re
from decimal import Decimal
from xml.etree import ElementTree

from phiconv.report.junit import junit_xml
from tests.report.results import (
    DML,
    every_status,
    measured,
    not_run,
    result,
    validation,
    with_checks,
)

TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
# Required attributes of the Ant JUnit report schema, and the type of each.
SUITE_ATTRIBUTES = {
    "name": r".+", "package": r".+", "id": r"\d+", "timestamp": TIMESTAMP, "hostname": r".+",
    "tests": r"\d+", "failures": r"\d+", "errors": r"\d+", "skipped": r"\d+", "time": r"\d+\.\d+",
}  # fmt: skip
CASE_ATTRIBUTES = {"classname": r".+", "name": r".+", "time": r"\d+\.\d+"}


def check_attributes(element: ElementTree.Element, patterns: dict[str, str]) -> None:
    assert set(element.attrib) == set(patterns)
    for name, pattern in patterns.items():
        value = element.attrib[name]
        assert re.fullmatch(pattern, value), (name, value)
        assert value == " ".join(value.split()), "xs:token"


def check_suite(suite: ElementTree.Element, index: int) -> None:
    check_attributes(suite, SUITE_ATTRIBUTES)
    assert suite.attrib["id"] == str(index)
    order = [child.tag for child in suite]
    cases = [child for child in suite if child.tag == "testcase"]
    assert order == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
    for item in suite[0]:
        assert item.tag == "property"
        check_attributes(item, {"name": r".+", "value": r".*"})
    for case in cases:
        check_attributes(case, CASE_ATTRIBUTES)
        assert len(case) <= 1
        assert {child.tag for child in case} <= {"failure", "skipped"}
        for failure in case.findall("failure"):
            assert {"message", "type"} == set(failure.attrib)
    assert int(suite.attrib["tests"]) == len(cases)
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
    assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped"))


def test_it_follows_the_ant_junit_schema() -> None:
    root = ElementTree.fromstring(junit_xml(every_status()).encode())
    assert root.tag == "testsuites"
    assert not root.attrib
    for index, suite in enumerate(root):
        assert suite.tag == "testsuite"
        check_suite(suite, index)
    assert len(root) == 4
    assert len(ElementTree.fromstring(junit_xml(result()).encode())) == 0


def test_one_test_case_a_gate_and_provider() -> None:
    good, bad, skipped, free = ElementTree.fromstring(junit_xml(every_status()).encode())
    names = [case.attrib["name"] for case in good.findall("testcase")]
    assert names == [
        "kl_divergence.mean max 0.05 on CPUExecutionProvider",
        "top1_agreement min 0.9 on CPUExecutionProvider",
    ]
    assert good.attrib["failures"] == "0"
    assert good.findtext("system-out") == (
        "passed on CPUExecutionProvider, target DmlExecutionProvider not present"
    )
    failures = [failure.attrib["message"] for failure in bad.findall("testcase/failure")]
    assert len(failures) == 2
    assert failures[0].startswith(
        "failed: top1_agreement measured 0.5, limit min 0.9, provider CPU"
    )
    assert failures[1].startswith(
        "failed: perplexity.ratio measured not finite, limit max 1.1, provider"
    )
    (case,) = skipped.findall("testcase")
    assert case.attrib["name"] == "provider DmlExecutionProvider"
    (note,) = case
    assert note.attrib["message"] == "not run, target DmlExecutionProvider not present"
    assert free.attrib["tests"] == "0"


def test_checks_are_test_cases_beside_the_gates() -> None:
    found = result(
        validation("ran", with_checks(measured(DML))), validation("idle", with_checks(not_run()))
    )
    ran, idle = ElementTree.fromstring(junit_xml(found).encode())
    for index, suite in enumerate((ran, idle)):
        check_suite(suite, index)
    assert [case.attrib["name"] for case in ran.findall("testcase")] == [
        "check genai_config",
        "kl_divergence.mean max 0.05 on CPUExecutionProvider",
        "top1_agreement min 0.9 on CPUExecutionProvider",
        "placement.fallback max 0 on CPUExecutionProvider",
        "kernels.unserved max 0 on DmlExecutionProvider",
    ]
    (failure,) = ran.findall("testcase/failure")
    assert (failure.text or "").splitlines()[1:] == [
        "unsupported: GroupQueryAttention <layer 0>",
        "note: Shape",
    ]
    assert idle.attrib["skipped"] == "2"
    assert idle.attrib["failures"] == "1"


def test_a_suites_time_is_its_stages() -> None:
    import dataclasses

    found = every_status()
    first = dataclasses.replace(found.validations[0], stage="check")
    root = ElementTree.fromstring(junit_xml(result(first)).encode())
    assert Decimal(root[0].attrib["time"]) == 70
