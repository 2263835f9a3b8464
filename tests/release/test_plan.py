"""What may be released, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from phiconv.errors import GateError, PhiconvError, Problems, RecipeError, StageError
from phiconv.recipe.model import Release
from phiconv.release import ReleaseOptions, ReleasePlan, plan_release
from phiconv.release.admission import parse_allowances
from phiconv.report.results import Measurement, RunResult, Validation
from tests.release.builds import (
    CPU,
    FP16,
    GGUF,
    Edit,
    copied,
    edit_manifest,
    edit_result,
    on_target,
)
from tests.terminal import Terminal

FALLBACK = "passed on CPUExecutionProvider, target CUDAExecutionProvider not present"

Outputs = dict[str, Path]


def refusal(kind: type[PhiconvError], *places: Path, allow: tuple[str, ...] = ()) -> PhiconvError:
    with pytest.raises(PhiconvError) as caught:
        plan_release(places, ReleaseOptions(allow=allow))
    assert caught.value.exit_code == kind.exit_code
    return caught.value


def planned(*places: Path, allow: tuple[str, ...] = ()) -> ReleasePlan:
    return plan_release(places, ReleaseOptions(allow=allow))


@pytest.fixture
def spoil(dist: Outputs, tmp_path: Path) -> Callable[..., Path]:
    """A copy of an output whose result is another."""

    def spoilt(name: str, edit: Callable[[RunResult], RunResult]) -> Path:
        output = copied(dist[name], tmp_path / name)
        edit_result(output, edit)
        return output

    return spoilt


def with_validation(edit: Callable[[Validation], Validation]) -> Callable[[RunResult], RunResult]:
    return lambda result: replace(result, validations=tuple(map(edit, result.validations)))


def test_artifacts_go_where_their_recipes_say(dist: Outputs) -> None:
    plan = planned(*dist.values(), allow=("not-run:cuda",))
    assert {item.path: sorted(item.files.values())[-1] for item in plan.items} == {
        "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4": (
            "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4/tokenizer_config.json"
        ),
        "cuda/cuda-fp16": "cuda/cuda-fp16/tokenizer_config.json",
        "gguf/Phi-3-mini-4k-instruct-q4.gguf": "gguf/Phi-3-mini-4k-instruct-q4.gguf",
    }
    assert plan.name == "Phi-3-tiny" and plan.base_model is None


def test_a_folder_of_outputs_and_its_index_page(dist: Outputs) -> None:
    folder = dist[CPU].parent
    places = sorted(folder.iterdir())
    assert folder / "index.html" in places
    one_by_one = planned(*places, allow=("not-run:cuda",))
    assert planned(folder, folder, allow=("not-run:cuda",)) == one_by_one


def test_a_gate_that_was_not_run_on_its_target(dist: Outputs) -> None:
    error = refusal(GateError, dist[CPU], dist[FP16])
    assert "phi-3-mini-4k-instruct-cuda-fp16" in error.message
    assert f"were not run on CUDAExecutionProvider: {FALLBACK}" in error.message
    assert "--allow not-run:cuda" in str(error.remedy)
    refusal(GateError, dist[FP16], allow=("not-run:dml",))
    plan = planned(dist[FP16], allow=("not-run:cuda", "not-run:dml"))
    ((waiver,),) = [item.waivers for item in plan.items]
    assert (waiver.provider, waiver.verdict) == ("cuda", FALLBACK)


def test_on_its_target_it_needs_no_exception(spoil: Callable[..., Path]) -> None:
    assert planned(spoil(FP16, on_target)).items[0].waivers == ()


def test_a_gate_that_failed_cannot_be_allowed(spoil: Callable[..., Path]) -> None:
    def fail(validation: Validation) -> Validation:
        first, *rest = validation.gates
        return replace(validation, gates=(replace(first, measured=0.9, passed=False), *rest))

    error = refusal(GateError, spoil(FP16, with_validation(fail)), allow=("not-run:cuda",))
    assert "failed: kl_divergence.mean measured 0.9" in error.message


def test_a_validation_without_gates(spoil: Callable[..., Path]) -> None:
    output = spoil(CPU, with_validation(lambda validation: replace(validation, gates=())))
    assert "measured without gates" in refusal(GateError, output).message


@pytest.mark.parametrize(("name", "provider"), [(CPU, "cpu"), (FP16, "cuda"), (GGUF, "llama.cpp")])
def test_a_build_without_validation(spoil: Callable[..., Path], name: str, provider: str) -> None:
    output = spoil(name, lambda result: replace(result, validations=()))
    assert "built without validation" in refusal(GateError, output).message
    assert planned(output, allow=(f"not-run:{provider}",)).items[0].waivers[0].provider == provider


def test_a_validation_that_was_skipped(spoil: Callable[..., Path]) -> None:
    def skip(validation: Validation) -> Validation:
        found = validation.measurement
        where = replace(found.provenance, provider=None)
        return replace(
            validation, gates=(), measurement=Measurement("not_run", found.tokens, where)
        )

    output = spoil(FP16, with_validation(skip))
    error = refusal(GateError, output)
    assert "not run, target CUDAExecutionProvider not present" in error.message
    planned(output, allow=("not-run:cuda",))


def test_everything_that_is_refused_is_said_at_once(
    dist: Outputs, spoil: Callable[..., Path]
) -> None:
    nowhere = spoil(GGUF, lambda result: replace(result, release_path=None))
    error = refusal(GateError, dist[FP16], nowhere)
    assert isinstance(error, Problems) and len(error.errors) == 2
    assert "does not say where the artifact goes" in error.message


def test_different_models_are_named(dist: Outputs, spoil: Callable[..., Path]) -> None:
    from phiconv.verify.output import _digest

    def other(result: RunResult) -> RunResult:
        files = {**result.checkpoint.files, "model.safetensors": "blake3:" + "0" * 64}
        record = replace(
            result.checkpoint, source="org/other", digest=_digest(files), revision="1" * 40,
            files=files,
        )  # fmt: skip
        return replace(result, checkpoint=record)

    error = refusal(RecipeError, dist[CPU], spoil(GGUF, other))
    assert "made from 2 different models" in error.message
    assert "acc-level-4 from Phi-3-tiny" in error.message
    assert "q4_k_m from org/other at 111111111111" in error.message


def test_the_hubs_record_of_the_same_files_goes_before_a_copys(
    dist: Outputs, spoil: Callable[..., Path]
) -> None:
    def hub(result: RunResult) -> RunResult:
        record = replace(result.checkpoint, source="microsoft/Phi-3-tiny", revision="1" * 40)
        return replace(result, checkpoint=record)

    plan = planned(dist[CPU], spoil(GGUF, hub))
    assert plan.base_model == "microsoft/Phi-3-tiny"
    assert plan.checkpoint.revision == "1" * 40


def renamed(result: RunResult) -> RunResult:
    return replace(result, recipe="another")


def test_one_file_name_with_two_contents(dist: Outputs, spoil: Callable[..., Path]) -> None:
    place = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"

    def same_place(result: RunResult) -> RunResult:
        return replace(on_target(result), release_path=place.upper())

    error = refusal(RecipeError, dist[CPU], spoil(FP16, same_place))
    assert f"{place}/model.onnx.data cannot be shipped" in error.message
    assert "cuda-fp16 has another such file" in error.message
    assert "tokenizer.json" not in error.message, "of which there is one"


@pytest.mark.parametrize("path", ["reports/x", "gguf/../x", "/x", "C:/x", "a\\b"])
def test_a_place_that_is_not_the_artifacts(spoil: Callable[..., Path], path: str) -> None:
    output = spoil(GGUF, lambda result: replace(result, release_path=path))
    message = refusal(RecipeError, output).message
    assert ("the release's own" if path == "reports/x" else "no path inside") in message


def test_gguf_files_share_a_folder_or_the_top(dist: Outputs, spoil: Callable[..., Path]) -> None:
    top = planned(spoil(GGUF, lambda result: replace(result, release_path=".")))
    assert [item.path for item in top.items] == ["Phi-3-mini-4k-instruct-q4.gguf"]


def test_two_outputs_of_one_recipe(dist: Outputs, tmp_path: Path) -> None:
    error = refusal(RecipeError, dist[CPU], copied(dist[CPU], tmp_path / "copy"))
    assert "two outputs have the name" in error.message


def test_what_is_no_output(dist: Outputs, tmp_path: Path) -> None:
    assert "there is no manifest.json" in refusal(RecipeError, tmp_path).message
    page = dist[CPU].parent / "index.html"
    assert "there is nothing to release" in refusal(RecipeError, page).message
    (tmp_path / "notes.txt").write_text("mine")
    refusal(RecipeError, dist[CPU], tmp_path / "notes.txt")


def test_manifest_and_report_that_contradict_each_other(dist: Outputs, tmp_path: Path) -> None:
    output = copied(dist[CPU], tmp_path / "out")
    edit_manifest(output, lambda manifest: manifest.update(verdict="ungated"))
    error = refusal(StageError, output)
    assert error.message.startswith("verdict: ") and error.where == str(output)


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest["report"].append("../../x"),
        lambda manifest: manifest["terms"]["files"].update({"../LICENSE": "x"}),
        lambda manifest: manifest["terms"]["files"].update({"README.md": "x"}),
    ],
)
def test_names_that_lead_out_of_an_output(dist: Outputs, tmp_path: Path, edit: Edit) -> None:
    output = copied(dist[CPU], tmp_path / "out")
    edit_manifest(output, edit)
    assert "cannot be a file of its own" in refusal(StageError, output).message


def test_a_recipe_whose_name_is_a_path(spoil: Callable[..., Path]) -> None:
    output = spoil(CPU, lambda result: replace(result, recipe="../../x"))
    assert "names '../../x'" in refusal(StageError, output).message


def test_a_manifest_of_an_older_version(dist: Outputs, tmp_path: Path) -> None:
    output = copied(dist[CPU], tmp_path / "out")
    edit_manifest(output, lambda manifest: manifest.pop("terms"))
    assert planned(output).terms.license is None
    edit_manifest(output, lambda manifest: manifest.update(terms=[]))
    assert "the model's licence" in refusal(StageError, output).message
    edit_manifest(output, lambda manifest: manifest.update(phiconv=99))
    assert "no manifest of phiconv's" in refusal(StageError, output).message


def test_exceptions_are_checked() -> None:
    assert parse_allowances(["not-run:dml", "not-run:CUDAExecutionProvider"]) == {"dml", "cuda"}
    for text in ("dml", "not-run:", "not-run:rocm", "failed:cpu"):
        with pytest.raises(RecipeError, match="there is no exception"):
            parse_allowances([text])


def test_the_command_refuses_with_exit_code_4(
    dist: Outputs, tmp_path: Path, phiconv: Terminal
) -> None:
    to = tmp_path / "to"
    done = phiconv("release", str(dist[CPU]), str(dist[FP16]), "--to", str(to))
    assert done.code == 4 and FALLBACK in done.err and not to.exists()
    allowed = ("--allow", "not-run:cuda", "--to", str(to))
    done = phiconv("release", str(dist[CPU]), str(dist[FP16]), *allowed)
    assert done.code == 0, done.err
    assert "Phi-3-tiny-onnx" in done.out and f"not run on cuda: {FALLBACK}" in done.out
    done = phiconv("verify", str(to))
    assert (done.code, done.err) == (0, "") and done.out.endswith(": whole\n")


def test_a_recipe_may_ship_to_the_top() -> None:
    assert Release(path=".").path == "."
    for path in ("", "..", "./..", "/"):
        with pytest.raises(ValidationError):
            Release(path=path)
