"""The document that `python -m benchmarks.cuda` writes, from results as a GPU would give them."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.cuda import Evidence, Part, gpu_test_files, markdown, run
from phiconv.machine import CPU, CUDA
from phiconv.report.results import RunResult
from tests.report.results import measured, result, validation

JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite>
<testcase classname="tests.test_cuda_builds" name="test_a" time="12.34" />
<testcase classname="tests.test_cuda_builds" name="test_b" time="0.1">
<skipped message="built for the CPU">x</skipped></testcase>
<testcase classname="tests.runtimes.test_c" name="test_c" time="0.2">
<failure message="assert 1 == 2&#10;more">x</failure></testcase>
</testsuite></testsuites>"""


def on_cuda(*strays: str) -> RunResult:
    found = measured(CUDA)
    provenance = replace(
        found.provenance,
        provider=CUDA,
        device="NVIDIA Imaginary 4000",
        driver="580.65.06 (CUDA 13.0)",
        placement={CPU: {"Shape": 1}, CUDA: {"MatMulNBits": 21, "GroupQueryAttention": 4}},
        strays=strays,
    )
    return result(validation("check", replace(found, provenance=provenance)))


def parts(code: int = 0) -> tuple[Part, ...]:
    return (
        Part("doctor", "phiconv doctor", 0, "providers\n  CUDAExecutionProvider  usable\n"),
        Part("build int4-cuda", "phiconv build recipes/int4-cuda.yaml", code, "error: no GPU\n"),
        Part("compare int4-cuda", "phiconv compare a b", 0, "no worse than the baseline\n"),
    )


def test_it_says_what_ran_where() -> None:
    evidence = Evidence(parts(), [on_cuda()], JUNIT)
    text = markdown(evidence)
    assert evidence.code == 0
    for line in (
        "| build int4-cuda | `phiconv build recipes/int4-cuda.yaml` | 0 |",
        "| test_cuda_builds: test_a | passed | 12.3 s |",
        "| test_cuda_builds: test_b | skipped: built for the CPU | 0.1 s |",
        "| runtimes.test_c: test_c | failure: assert 1 == 2 | 0.2 s |",
        "| operator | CPUExecutionProvider | CUDAExecutionProvider |",
        "| GroupQueryAttention | 0 | 4 |",
        "| **all** | 1 | 25 |",
        "MatMul and attention nodes elsewhere than on CUDAExecutionProvider: none.",
        "no worse than the baseline",
        "  CUDAExecutionProvider  usable",
    ):
        assert line in text.splitlines(), line
    (row,) = [line for line in text.splitlines() if line.startswith("| tiny-int4 |")]
    assert "| passed on CUDAExecutionProvider |" in row
    assert "| NVIDIA Imaginary 4000 | 580.65.06 (CUDA 13.0) |" in row


def test_work_that_ran_elsewhere_is_named() -> None:
    stray = "MatMul /lm_head/MatMul on CPUExecutionProvider"
    assert f"CUDAExecutionProvider: {stray}." in markdown(Evidence(parts(), [on_cuda(stray)], None))


def test_what_failed_is_shown_and_is_the_exit_code() -> None:
    evidence = Evidence(parts(code=5), [], None)
    text = markdown(evidence)
    assert evidence.code == 5
    assert "not run" in text
    assert "none was built" in text
    assert text.endswith("## Failed: build int4-cuda\n\n```text\nerror: no GPU\n```\n")


def test_only_files_with_tests_for_a_gpu_are_collected() -> None:
    files = gpu_test_files()
    assert "tests/test_cuda_builds.py" in files
    assert "tests/runtimes/test_onnxruntime.py" in files
    assert "tests/test_compare.py" not in files


def test_a_part_keeps_exit_code_and_output() -> None:
    found = run("no recipe", "phiconv", "plan", "absent.yaml")
    assert (found.code, found.command) == (2, "phiconv plan absent.yaml")
    assert "absent.yaml" in found.output
