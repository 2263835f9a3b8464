from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from phiconv.checkpoint import Checkpoint, DigestCache, hub, resolve
from phiconv.checkpoint.source import looks_like_path
from phiconv.errors import CheckpointError, EnvironmentLacksError, PhiconvError, RecipeError
from tests.checkpoint.hub_server import COMMIT, Hub, serve
from tests.phi3_checkpoints import write_phi3_checkpoint

METADATA = [
    "LICENSE",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]
CARD = "README.md"
DOWNLOADED = sorted([*METADATA, CARD])
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def served(tmp_path) -> Hub:
    """A sharded model with files beside it that nobody needs."""
    folder = write_phi3_checkpoint(tmp_path / "served", shards=2)
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("words")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_phi3.py").write_text("raise SystemExit('remote code was run')")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"another copy of the weights")
    return Hub(folder)


@pytest.fixture
def environment(served, tmp_path, monkeypatch) -> Iterator[Hub]:
    """huggingface_hub, pointed to the stand-in and to an empty cache."""
    from huggingface_hub import constants

    with serve(served) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield served


@pytest.fixture
def offline(environment, monkeypatch):
    def switch() -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return switch


def refusal(kind: type[PhiconvError], *args, **kwargs) -> PhiconvError:
    with pytest.raises(PhiconvError) as caught:
        resolve(*args, **kwargs)
    assert type(caught.value) is kind, caught.value
    assert caught.value.remedy
    return caught.value


def test_a_folder(tmp_path):
    write_phi3_checkpoint(tmp_path / "phi")
    cache = DigestCache(tmp_path / "cache")
    checkpoint = resolve(str(tmp_path / "phi"), None, cache)
    assert checkpoint.path == tmp_path / "phi"
    assert checkpoint.source == str(tmp_path / "phi") and checkpoint.revision is None
    assert checkpoint.digest == Checkpoint(tmp_path / "phi").digest


def test_an_existing_folder_goes_before_a_hub_id(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_phi3_checkpoint(Path("org/phi"))
    checkpoint = resolve("org/phi")
    assert checkpoint.revision is None and checkpoint.source == "org/phi"
    assert checkpoint.path == tmp_path / "org" / "phi"
    assert environment.requests == []


def test_a_folder_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_phi3_checkpoint(tmp_path / "phi")
    assert resolve("~/phi").path == tmp_path / "phi"


def test_a_folder_has_no_revision(tmp_path):
    write_phi3_checkpoint(tmp_path)
    assert "a revision belongs to a model on the Hub" in str(
        refusal(RecipeError, str(tmp_path), "main")
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("./phi", True),
        ("../phi", True),
        ("/models/phi", True),
        ("~/phi", True),
        ("C:/phi", True),
        ("C:phi", True),
        ("models\\phi", True),
        ("models/phi/instruct", True),
        ("models/", True),
        ("microsoft/Phi-3-mini-4k-instruct", False),
        ("phi-3", False),
    ],
)
def test_what_looks_like_a_path(source, expected):
    assert looks_like_path(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "./phi",
        "/no/such/folder",
        "a/b/c",
        "~/no/such",
        "~nobody-here/x",
        "C:\\phi",
        "/" + "x" * 5000,
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_up(environment, source):
    error = refusal(EnvironmentLacksError, source)
    assert error.message == f"there is no folder '{source}'"
    assert environment.requests == []


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "phi.gguf").write_bytes(b"GGUF")
    assert "is a file; a checkpoint is a folder" in str(
        refusal(RecipeError, str(tmp_path / "phi.gguf"))
    )


def test_a_url_is_no_source(environment):
    error = refusal(RecipeError, "https://huggingface.co/microsoft/Phi-3-mini-4k-instruct")
    assert "is a URL" in error.message
    assert environment.requests == []


def test_an_empty_source():
    assert refusal(RecipeError, "").message == "the model's source is empty"


@pytest.mark.parametrize("source", ["a b/c", "org/-phi", "x" * 200, "x" * 5000, "a\0b"])
def test_an_invalid_id(environment, source):
    error = refusal(RecipeError, source)
    assert "is neither a folder nor a valid Hugging Face id" in error.message
    assert environment.requests == []


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_a_model_is_pinned_to_its_commit(environment, tmp_path, revision):
    seen: list[int] = []
    checkpoint = resolve("org/phi", revision, on_bytes=seen.append)
    assert checkpoint.revision == COMMIT and checkpoint.source == "org/phi"
    assert checkpoint.path == tmp_path / "hub" / "models--org--phi" / "snapshots" / COMMIT
    assert checkpoint.files == tuple(METADATA)
    assert checkpoint.weight_files == tuple(SHARDS)
    assert environment.downloads == sorted([*DOWNLOADED, INDEX, *SHARDS])
    assert sum(seen) == sum((environment.folder / shard).stat().st_size for shard in SHARDS)
    expected = Checkpoint(environment.folder)
    assert checkpoint.digest == expected.digest


def test_where_nobody_may_make_links_nothing_is_said_of_it(environment, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refused)
    checkpoint = resolve("org/phi")
    assert not any((checkpoint.path / name).is_symlink() for name in checkpoint.files)
    assert checkpoint.digest == Checkpoint(environment.folder).digest


def test_a_single_weight_file_goes_before_an_index(environment):
    for shard in SHARDS:
        (environment.folder / shard).unlink()
    single = write_phi3_checkpoint(environment.folder.parent / "single")
    shutil.copy(single / "model.safetensors", environment.folder)
    assert resolve("org/phi").weight_files == ("model.safetensors",)


def test_what_is_in_the_cache_is_not_downloaded_again(environment):
    resolve("org/phi", "v1")
    environment.requests.clear()
    assert resolve("org/phi", COMMIT).revision == COMMIT
    assert environment.requests == []
    assert resolve("org/phi", "v1").revision == COMMIT
    assert environment.requests == ["GET /api/models/org/phi/revision/v1"]


def test_only_what_is_missing_is_downloaded(environment):
    path = resolve("org/phi").path
    (path / SHARDS[1]).resolve().unlink()
    (path / SHARDS[1]).unlink(missing_ok=True)
    environment.requests.clear()
    resolve("org/phi")
    assert environment.downloads == [SHARDS[1]]


def test_offline_from_the_cache(environment, offline):
    resolve("org/phi", "v1")
    environment.requests.clear()
    offline()
    for revision in ("v1", COMMIT):
        assert resolve("org/phi", revision).revision == COMMIT
    assert environment.requests == []


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_offline_and_not_in_the_cache(environment, offline, revision):
    offline()
    error = refusal(EnvironmentLacksError, "org/phi", revision)
    assert "not (all) in the cache, and HF_HUB_OFFLINE forbids" in error.message
    assert "unset HF_HUB_OFFLINE" in error.remedy
    assert environment.requests == []


def test_offline_and_a_shard_is_missing(environment, offline):
    path = resolve("org/phi").path
    (path / SHARDS[1]).unlink()
    offline()
    assert "HF_HUB_OFFLINE" in str(refusal(EnvironmentLacksError, "org/phi", COMMIT))


def test_without_download(environment):
    error = refusal(EnvironmentLacksError, "org/phi", download=False)
    assert error.message == "this model is not in the cache"
    assert environment.requests == []

    hub.fetch_metadata("org/phi", None)
    environment.requests.clear()
    error = refusal(EnvironmentLacksError, "org/phi", download=False)
    assert error.message == "2 weight files (0.00 GB) are not downloaded yet"
    assert COMMIT in error.remedy

    resolve("org/phi")
    environment.requests.clear()
    assert resolve("org/phi", download=False).revision == COMMIT
    assert environment.requests == []


def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(environment):
    config = environment.folder / "config.json"
    values = json.loads(config.read_text()) | {"architectures": ["PhiMoEForCausalLM"]}
    config.write_text(json.dumps(values))
    error = refusal(CheckpointError, "org/phi")
    assert "PhiMoEForCausalLM (Phi-3.5-MoE: mixture of experts)" in error.message
    assert not set(SHARDS) & set(environment.downloads)


def test_a_pickled_model_is_refused_without_a_download(environment):
    for name in (*SHARDS, INDEX, "consolidated.safetensors"):
        (environment.folder / name).unlink()
    error = refusal(CheckpointError, "org/phi")
    assert "the weights are pickled ('pytorch_model.bin')" in error.message
    assert error.where == f"org/phi@{COMMIT}"
    assert environment.downloads == DOWNLOADED


def test_a_shard_outside_the_repository_is_refused(environment):
    index = environment.folder / INDEX
    index.write_text(index.read_text().replace(SHARDS[0], "../../config.json"))
    error = refusal(CheckpointError, "org/phi")
    assert "'../../config.json' leads out of the checkpoint's folder" in error.message


def test_no_such_model(environment):
    error = refusal(EnvironmentLacksError, "org/nonesuch")
    assert "there is no such folder, and no such model at http://127.0.0.1" in error.message
    assert error.where == "org/nonesuch"
    assert error.exit_code == 5


def test_no_such_revision(environment):
    error = refusal(EnvironmentLacksError, "org/phi", "v2")
    assert error.message == "this model has no such revision"
    assert error.where == "org/phi@v2"


@pytest.mark.parametrize(
    ("answer", "message", "remedy"),
    [
        ((403, "GatedRepo"), "access to this model is gated", "accept its terms at http"),
        ((401, "RepoNotFound"), "no such model at", "run `hf auth login` or set HF_TOKEN"),
        ((401, ""), "access was denied", "run `hf auth login` or set HF_TOKEN"),
        ((403, ""), "access was denied", "run `hf auth login` or set HF_TOKEN"),
        ((500, ""), "cannot be reached: ", "check the network and HF_ENDPOINT"),
    ],
)
def test_refusals_of_the_hub(environment, answer, message, remedy):
    environment.refusal = answer
    error = refusal(EnvironmentLacksError, "org/phi")
    assert message in error.message
    assert remedy in error.remedy


def test_the_hub_cannot_be_reached(environment, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        error = refusal(EnvironmentLacksError, "org/phi")
    assert re.search(r"http://127.0.0.1:\d+ cannot be reached: .*refused", error.message)


def test_a_download_that_breaks_off(environment, monkeypatch):
    # huggingface_hub waits between its five attempts
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    environment.broken_file = SHARDS[1]
    error = refusal(EnvironmentLacksError, "org/phi")
    assert "cannot be reached" in error.message
    environment.broken_file = None
    environment.requests.clear()
    assert resolve("org/phi").revision == COMMIT
    assert environment.downloads == [SHARDS[1]]


def test_a_full_disk_is_noticed_before_the_download(environment, monkeypatch):
    hub.fetch_metadata("org/phi", None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    error = refusal(EnvironmentLacksError, "org/phi")
    assert error.message == "downloading needs 0.00 GB, but only 0.00 GB are free"
    assert "HF_HOME" in error.remedy


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk of the Hugging Face cache is full"),
        (errno.EACCES, "the Hugging Face cache cannot be used"),
    ],
)
def test_a_cache_that_cannot_be_written(environment, monkeypatch, code, message):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    error = refusal(EnvironmentLacksError, "org/phi")
    assert message in error.message
    assert "HF_HOME" in error.remedy


def test_the_environment_variables_of_hugging_face_are_honoured(served, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which huggingface_hub reads when it is imported."""
    program = (
        "from phiconv.checkpoint import resolve; c = resolve('org/phi', 'v1');"
        "print(c.path, c.revision, c.read('model.norm.weight').shape)"
    )
    with serve(served) as url:
        variables = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        root = Path(__file__).parents[2]
        for offline in ("0", "1"):
            done = subprocess.run(
                [sys.executable, "-c", program],
                env=variables | {"HF_HUB_OFFLINE": offline, "PYTHONPATH": str(root)},
                capture_output=True,
                text=True,
                check=True,
            )
            snapshot = tmp_path / "home" / "hub" / "models--org--phi" / "snapshots" / COMMIT
            assert done.stdout == f"{snapshot} {COMMIT} (128,)\n"
            requests = len(served.requests)
        assert len(served.requests) == requests
