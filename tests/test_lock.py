"""Lock files on the real stages: what they say, and that every drift is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiconv import lock as lock_module
from phiconv import machine
from tests.checkpoint.hub_server import COMMIT, Hub, serve
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.terminal import Done, Terminal

TINY = Path(__file__).parent.parent / "examples" / "tiny-phi3"
RECIPE = """\
schema: 1
name: locked
model: {source: model}
stages:
  - {id: onnx, uses: export-onnx, with: {provider: cpu}}
  - {id: int4, uses: quantize, with: {bits: 4, block_size: 32}}
  - id: check
    uses: validate
    with:
      when_missing: skip
      tokens: texts.txt
      windows: 1
      window_length: 8
      gates: {kl_divergence.mean: {max: 0.5}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with a model and a text beside it."""
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "texts.txt").write_text("Measured on a few words, which are enough. " * 4, "utf-8")
    file = tmp_path / "locked.yaml"
    file.write_text(RECIPE, encoding="utf-8")
    return file


@pytest.fixture
def locked(recipe: Path, phiconv: Terminal) -> Path:
    """The recipe, locked."""
    assert phiconv("lock", str(recipe)).code == 0
    return recipe


def lock_of(recipe: Path) -> Path:
    return recipe.with_name("locked.lock.json")


def differences(done: Done) -> dict[str, str]:
    """What a refusal names: the locked and the present value by key."""
    lines = [line.removeprefix("error: ") for line in done.err.splitlines()
             if line.startswith("error: ")]  # fmt: skip
    return dict(line.split(": ", 1) for line in lines)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1
    file.write_text(text.replace(old, new), encoding="utf-8")


def test_a_lock_says_what_the_build_is_made_of(recipe: Path, phiconv: Terminal) -> None:
    done = phiconv("lock", str(recipe))
    assert (done.code, done.out) == (0, f"{lock_of(recipe)}: written\n")
    text = lock_of(recipe).read_text(encoding="utf-8")
    assert str(recipe.parent) not in text
    document = json.loads(text)
    assert document["lock"] == 1
    assert document["checkpoint"]["source"] == "model"
    assert set(document["checkpoint"]["files"]) >= {"config.json", "model.safetensors"}
    assert set(document["tools"]) >= {"onnx-ir", "torch", "onnxruntime-genai"}
    [planned] = json.loads(phiconv("plan", str(recipe), "--json").out)
    keys = {step["id"]: step["key"] for step in planned["steps"] if step["id"] != "check"}
    assert {name: step["key"] for name, step in document["steps"].items()} == {
        **keys,
        "check": None,
    }
    reference = document["steps"]["reference"]["params"]
    assert reference["text_digest"].startswith("sha256:")
    assert phiconv("lock", str(recipe)).out == f"{lock_of(recipe)}: as it was\n"
    assert lock_of(recipe).read_text(encoding="utf-8") == text
    assert [path.name for path in recipe.parent.glob(".*")] == []


def test_a_locked_build_is_the_build(locked: Path, phiconv: Terminal, tmp_path: Path) -> None:
    assert phiconv("plan", str(locked), "--locked").code == 0
    out = tmp_path / "out"
    done = phiconv("build", str(locked), "--locked", "--skip-validation", "--out", str(out))
    assert done.code == 0, done.err
    assert f"locked: all as locked in {lock_of(locked)}\n" in done.err
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    document = json.loads(lock_of(locked).read_text(encoding="utf-8"))
    assert manifest["steps"]
    for step in manifest["steps"]:
        assert step["key"] == document["steps"][step["id"]]["key"]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("block_size: 32", "block_size: 64", "recipe.stages.int4.with.block_size"),
        ("{max: 0.5}", "{max: 9}", "recipe.stages.check.with.gates.kl_divergence.mean.max"),
        ("windows: 1", "windows: 2", "recipe.stages.check.with.windows"),
        ("name: locked", "name: other", "recipe.name"),
    ],
)
def test_a_changed_recipe_is_refused(
    locked: Path, phiconv: Terminal, old: str, new: str, name: str
) -> None:
    edit(locked, old, new)
    done = phiconv("build", str(locked), "--locked")
    assert done.code == 2
    assert set(differences(done)) == {name}
    assert f"where: {lock_of(locked)}" in done.err
    assert f"or lock again: phiconv lock {locked}" in done.err


def test_a_stage_that_came_or_went_is_named(locked: Path, phiconv: Terminal) -> None:
    stage = "  - {id: more, uses: validate, from: int4, with: {windows: 1}}\n"
    locked.write_text(locked.read_text(encoding="utf-8") + stage, encoding="utf-8")
    came = phiconv("plan", str(locked), "--locked")
    assert differences(came)["recipe.stages.more"].startswith("locked is absent, here is {")
    assert phiconv("lock", str(locked)).code == 0
    edit(locked, stage, "")
    went = phiconv("plan", str(locked), "--locked")
    assert differences(went)["recipe.stages.more"].endswith(", here is absent")
    assert (came.code, went.code) == (2, 2)


def test_a_lock_that_cannot_be_read_or_written_is_told(recipe: Path, phiconv: Terminal) -> None:
    lock_of(recipe).mkdir()
    done = phiconv("build", str(recipe), "--locked")
    assert (done.code, "cannot be read: " in done.err) == (2, True)
    done = phiconv("lock", str(recipe))
    assert (done.code, "cannot be written: " in done.err) == (2, True)
    assert f"where: {lock_of(recipe)}" in done.err
    assert [path.name for path in recipe.parent.glob(".*")] == []


def test_what_the_command_line_changes_is_refused_too(locked: Path, phiconv: Terminal) -> None:
    done = phiconv("plan", str(locked), "--locked", "--set", "int4.search=mse")
    assert done.code == 2
    assert differences(done) == {"recipe.stages.int4.with.search": "locked is absent, here is mse"}
    done = phiconv("plan", str(locked), "--locked", "--revision", "main")
    assert done.code == 2
    assert differences(done) == {"checkpoint.revision": "locked is absent, here is main"}
    mirror = ("--model", "org/mirror", "--revision", "main")
    done = phiconv("plan", str(locked), "--locked", *mirror)
    assert done.code == 5, "the revision is that of the other model, which is not there"


def test_changed_files_are_refused_together(locked: Path, phiconv: Terminal) -> None:
    (locked.parent / "texts.txt").write_text("Other words to measure on, these. " * 4, "utf-8")
    with (locked.parent / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    done = phiconv("plan", str(locked), "--locked")
    assert done.code == 2
    found = differences(done)
    assert set(found) == {
        "checkpoint.files.model.safetensors",
        "steps.reference.params.text_digest",
    }
    assert found["checkpoint.files.model.safetensors"].startswith("locked is blake3:")
    assert "remedy: use the model that was locked" in done.err
    assert "remedy: put back the texts or files that were locked" in done.err


def test_other_versions_are_refused_as_lacking(
    locked: Path, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = machine.version
    torch = version("torch")
    monkeypatch.setattr(machine, "version", lambda n: "0.1" if n == "torch" else version(n))
    done = phiconv("build", str(locked), "--locked")
    assert done.code == 5
    assert differences(done) == {"tools.torch": f"locked is {torch}, here is 0.1"}
    assert f"remedy: install torch {torch}, or lock again" in done.err
    monkeypatch.setattr(lock_module, "__version__", "99.0")
    edit(locked, "block_size: 32", "block_size: 64")
    done = phiconv("build", str(locked), "--locked")
    assert done.code == 2, "what no machine can make up for decides"
    assert set(differences(done)) == {
        "recipe.stages.int4.with.block_size",
        "phiconv",
        "tools.torch",
    }


def test_a_new_version_of_a_stage_is_refused(
    locked: Path, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phiconv.stages.quantize.Quantize.version", 99)
    found = differences(phiconv("plan", str(locked), "--locked"))
    assert found == {"steps.int4.version": "locked is 1, here is 99"}


def test_another_model_may_stand_in_when_its_files_are_the_same(
    locked: Path, phiconv: Terminal, tmp_path: Path
) -> None:
    copy = shutil.copytree(TINY, tmp_path / "mirror")
    command = ("plan", str(locked), "--locked", "--model", str(copy))
    assert phiconv(*command).code == 0
    edit(copy / "generation_config.json", "{", "{ ")
    done = phiconv(*command)
    assert done.code == 2
    assert set(differences(done)) == {"checkpoint.files.generation_config.json"}


def test_where_a_measurement_runs_is_no_drift(
    locked: Path, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "providers", lambda: ())
    assert phiconv("plan", str(locked), "--locked").code == 0


def test_locking_again_says_what_changed(locked: Path, phiconv: Terminal) -> None:
    edit(locked, "block_size: 32", "block_size: 64")
    done = phiconv("lock", str(locked))
    assert done.out.startswith(f"{lock_of(locked)}: changed\n")
    assert "  recipe.stages.int4.with.block_size: 32 -> 64\n" in done.out
    assert phiconv("plan", str(locked), "--locked").code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no lock file"),
        ("{", "not a lock file of this format"),
        ('{"lock": 2}', "not a lock file of this format: lock: "),
        (
            '{"lock": 1, "phiconv": "0", "recipe": {"stages": [0]}, "checkpoint": '
            '{"source": "", "revision": null, "files": {}}, "tools": {}, "steps": {}}',
            "not a lock file of this format: recipe.",
        ),
    ],
)
def test_a_missing_or_strange_lock_is_told(
    recipe: Path, phiconv: Terminal, text: str | None, message: str
) -> None:
    if text is not None:
        lock_of(recipe).write_text(text, encoding="utf-8")
    done = phiconv("build", str(recipe), "--locked")
    assert done.code == 2
    assert message in done.err
    assert "remedy: make it with `phiconv lock`" in done.err
    assert phiconv("lock", str(recipe)).code == 0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback with a model that nobody has yet."""
    from huggingface_hub import constants

    served = Hub(write_phi3_checkpoint(tmp_path / "served"))
    with serve(served) as url:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield served


def test_a_model_of_the_hub_is_fetched_at_the_locked_commit(
    recipe: Path, hub: Hub, phiconv: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    edit(recipe, "{source: model}", f"{{source: {hub.repo_id}, revision: main}}")
    done = phiconv("lock", str(recipe))
    assert done.code == 0, done.err
    document = json.loads(lock_of(recipe).read_text(encoding="utf-8"))
    assert document["checkpoint"]["revision"] == COMMIT
    assert document["recipe"]["model"] == {"source": hub.repo_id, "revision": "main"}

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    hub.revisions = ()
    hub.requests.clear()
    out = tmp_path / "out"
    done = phiconv("build", str(recipe), "--locked", "--skip-validation", "--out", str(out))
    assert done.code == 0, done.err
    assert "model.safetensors" in hub.downloads
    assert not [request for request in hub.requests if "main" in request]
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["checkpoint"]["revision"] == COMMIT

    edit(recipe, "revision: main", "revision: v1")
    hub.requests.clear()
    done = phiconv("build", str(recipe), "--locked")
    assert done.code == 2
    assert differences(done) == {"recipe.model.revision": "locked is main, here is v1"}
    assert hub.requests == [], "a recipe that is not as locked downloads nothing"
