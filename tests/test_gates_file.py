from __future__ import annotations

from pathlib import Path

import pytest

from phiconv.errors import Problems, RecipeError
from phiconv.recipe.gates_file import read_gates, with_settings


def written(folder: Path, text: str) -> Path:
    path = folder / "gates.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_gates_are_read(tmp_path: Path) -> None:
    file = written(
        tmp_path, "kl_divergence.mean: {max: 1e-3}\ntop1_agreement:\n  min: 0.9\n  max: 1\n"
    )
    found = read_gates(file, generates=False)
    assert found.limits == {
        "kl_divergence.mean": {"max": 1e-3},
        "top1_agreement": {"min": 0.9, "max": 1.0},
    }
    assert found.extra == {}


@pytest.mark.parametrize("text", ["", "# none\n", "{}\n"])
def test_a_file_may_hold_no_gate(tmp_path: Path, text: str) -> None:
    assert read_gates(written(tmp_path, text), generates=False).limits == {}


def test_other_keys_are_handed_over_when_they_are_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path, "kl_divergence.mean: {max_regression: 10%}\n")
    found = read_gates(file, generates=False, also=("max_regression",))
    assert found.extra == {"kl_divergence.mean": {"max_regression": "10%"}}
    assert found.limits == {}
    with pytest.raises(RecipeError, match="unknown key"):
        read_gates(file, generates=False)


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("\nkl_divergence.men: {max: 1}", "unknown metric 'kl_divergence.men'", "did you mean"),
        ("\ntop1_agreement: {mn: 1}", "top1_agreement.mn: unknown key", "did you mean 'min'?"),
        ("\ntop1_agreement: 0.9", "wants a mapping with min or max, not 0.9", ""),
        ("\ntop1_agreement: {min: high}", "wants a finite number, not 'high'", ""),
        ("\ntop1_agreement: {min: true}", "wants a finite number, not True", ""),
        ("\ntop1_agreement: {}", "has no limit", "min or a max"),
        ("\ndecode_error.max: {max: 1}", "not measured by this runtime", "onnxruntime-genai"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, text: str, message: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_gates(written(tmp_path, text), generates=False)
    assert message in caught.value.message
    assert remedy in (caught.value.remedy or "")
    assert (caught.value.where or "").endswith("gates.yaml:2")


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        read_gates(written(tmp_path, "a: {max: 1}\nb: {max: 1}\n"), generates=False)
    assert len(caught.value.errors) == 2
    with pytest.raises(RecipeError, match="maps metric names"):
        read_gates(written(tmp_path, "[1]"), generates=False)
    with pytest.raises(RecipeError, match="there is no gates file"):
        read_gates(tmp_path / "absent.yaml", generates=False)


def test_settings_replace_single_limits() -> None:
    gates = {"top1_agreement": {"min": 0.9, "max": 1.0}}
    found = with_settings(gates, ["top1_agreement.min=0.95", "kl_divergence.mean.max=1e-2"])
    assert found == {
        "top1_agreement": {"min": 0.95, "max": 1.0},
        "kl_divergence.mean": {"max": 0.01},
    }
    assert gates["top1_agreement"]["min"] == 0.9, "the argument is not changed"


@pytest.mark.parametrize(
    "setting", ["top1_agreement=1", "top1_agreement.min", "min=1", "top1_agreement.mn=1",
                "top1_agreement.min=x", "top1_agreement.min=", "top1_agreement.min=0.9=1",
                "top1_agreement.min=1e999"]
)  # fmt: skip
def test_a_setting_of_another_form_is_refused(setting: str) -> None:
    with pytest.raises(RecipeError) as caught:
        with_settings({}, [setting])
    assert caught.value.where == f"--set-gate {setting}"
    assert caught.value.exit_code == 2
