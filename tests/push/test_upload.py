"""Releases pushed to a stand-in of the Hub, through huggingface_hub and its own uploader."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from phiconv.errors import EnvironmentLacksError, PhiconvError, RecipeError, StageError
from phiconv.push import Pushed, PushPlan, Target, plan_push, push
from phiconv.push.failures import translated_failures
from phiconv.verify.sums import SUMS, render_sums
from tests.push.hub_stub import READ, WRITE, HubStub, Repository, commit_id, serve

REPO = "org/phi-onnx"
CARD = "---\nlicense: mit\n---\n# A card\n"
MODEL, PARAMETERS = "cpu/model.onnx", "cpu/model [1].bin"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder with a card, a small file, a large one with a name that is a pattern, its sums."""
    folder = tmp_path / "release"
    (folder / "cpu").mkdir(parents=True)
    (folder / "README.md").write_text(CARD, encoding="utf-8", newline="\n")
    (folder / MODEL).write_bytes(b"graph")
    (folder / PARAMETERS).write_bytes(random.Random(0).randbytes(300_000))
    write_sums(folder)
    return folder


def write_sums(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SUMS]
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
               for path in files}  # fmt: skip
    (folder / SUMS).write_text(render_sums(digests), encoding="utf-8", newline="\n")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The stand-in with an empty repository, and huggingface_hub pointed to it, logged in."""
    from huggingface_hub import constants

    stub = HubStub({REPO: Repository()})
    with serve(stub) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
        yield stub


@pytest.fixture(params=["xet", "lfs"])
def protocol(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How large files travel: as it comes installed, and without hf_xet."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return str(request.param)


def states(plan: PushPlan) -> dict[str, str]:
    return {file.name: state for file, state in plan.files}


def refusal(kind: type[PhiconvError], release: Path, **options: bool) -> PhiconvError:
    with pytest.raises(kind) as caught:
        push(plan_push(release, Target(REPO)), **options)
    return caught.value


def test_a_release_arrives_whole_in_one_commit(release: Path, hub: HubStub, protocol: str) -> None:
    floats = struct.pack("<50000f", *(index / 50_000 for index in range(50_000)))
    (release / "cpu" / "compresses.bin").write_bytes(floats + b"again and again " * 10_000)
    write_sums(release)
    before = contents(release)
    plan = plan_push(release, Target(REPO))
    assert states(plan) == dict.fromkeys(before, "new")
    assert plan.upload_bytes == sum(map(len, before.values()))
    done = push(plan, message="Version 1")
    repository = hub.repositories[REPO]
    attributes = repository.commits[1]
    assert repository.files() == {**attributes, **before}
    assert done == Pushed(done.url, commit_id(2), new=True)
    assert done.url.endswith(f"/{REPO}/commit/{commit_id(2)}")
    assert repository.messages == ["Version 1"]
    assert contents(release) == before, "nothing is left in the folder"
    assert bool(hub.asked("xet-write-token")) == (protocol == "xet")
    assert bool(hub.asked("PUT /lfs/")) == (protocol == "lfs")


def test_what_is_there_already_is_not_uploaded_again(
    release: Path, hub: HubStub, protocol: str
) -> None:
    push(plan_push(release, Target(REPO)))
    sent = hub.uploaded
    plan = plan_push(release, Target(REPO))
    assert set(states(plan).values()) == {"same"}
    done = push(plan)
    assert (done.new, done.commit, hub.uploaded) == (False, commit_id(2), sent)

    (release / MODEL).write_bytes(b"another graph")
    write_sums(release)
    plan = plan_push(release, Target(REPO))
    assert {name for name, state in states(plan).items() if state == "changed"} == {MODEL, SUMS}
    assert push(plan).new
    assert hub.repositories[REPO].files()[MODEL] == b"another graph"
    assert hub.uploaded == sent


def test_an_upload_that_breaks_off_changes_nothing_and_goes_on(
    release: Path, hub: HubStub, protocol: str
) -> None:
    """The first large file arrives, the connection breaks at the second, the server is back."""
    (release / "other.bin").write_bytes(random.Random(1).randbytes(200_000))
    write_sums(release)
    stored = r"POST /v1/shards|POST /v2/shards" if protocol == "xet" else r"PUT /lfs/"

    def break_off(request: str) -> None:
        if hub.asked(r"/commit/main$"):
            raise ConnectionError

    hub.before = break_off
    from huggingface_hub.utils import _http

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_http.time, "sleep", lambda seconds: None)
        error = refusal(EnvironmentLacksError, release)
    assert "broke off" in error.message
    assert error.remedy is not None and "run the same command again" in error.remedy
    assert hub.asked(stored)
    repository = hub.repositories[REPO]
    assert (repository.branches, list(repository.commits)) == ({"main": 1}, [1])
    sent = hub.uploaded
    assert sent >= 500_000

    hub.before = lambda request: None
    assert push(plan_push(release, Target(REPO))).new
    assert repository.files() == {**repository.commits[1], **contents(release)}
    if protocol == "lfs":
        assert hub.uploaded == sent, "the large files were there"


def test_a_missing_repository_is_made_when_asked(release: Path, hub: HubStub) -> None:
    hub.repositories.clear()
    assert plan_push(release, Target(REPO)).remote.state == "no repository"
    error = refusal(EnvironmentLacksError, release)
    assert "there is no such repository" in error.message
    assert error.remedy is not None and "--create" in error.remedy
    assert hub.repositories == {}
    notes: list[str] = []
    push(plan_push(release, Target(REPO)), make=True, private=True, note=notes.append)
    assert notes == [f"making {REPO}"]
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].files()["README.md"] == CARD.encode()


def test_a_missing_branch_is_made_when_asked(release: Path, hub: HubStub) -> None:
    target = Target(REPO, "v2")
    with pytest.raises(EnvironmentLacksError, match="has no branch 'v2'"):
        push(plan_push(release, target))
    push(plan_push(release, target), make=True)
    repository = hub.repositories[REPO]
    assert MODEL in repository.files("v2")
    assert MODEL not in repository.files()


def test_a_pull_request_leaves_the_branch_alone(release: Path, hub: HubStub) -> None:
    done = push(plan_push(release, Target(REPO)), pull_request=True)
    assert done.url.endswith("/discussions/1")
    repository = hub.repositories[REPO]
    assert MODEL not in repository.files()
    assert MODEL in repository.files("refs/pr/1")
    again = push(plan_push(release, Target(REPO, "refs/pr/1")))
    assert (again.new, again.commit) == (False, done.commit)


def test_other_files_stay_unless_they_are_to_go(release: Path, hub: HubStub) -> None:
    hub.repositories[REPO].commits[1]["old/model.onnx"] = b"of the release before"
    plan = plan_push(release, Target(REPO))
    assert plan.others == ("old/model.onnx",)
    push(plan)
    assert "old/model.onnx" in hub.repositories[REPO].files()
    push(plan_push(release, Target(REPO)), delete_others=True)
    assert set(hub.repositories[REPO].files()) == {".gitattributes", *contents(release)}


def test_nothing_public_is_made_of_what_is_private(release: Path, hub: HubStub) -> None:
    error = refusal(RecipeError, release, private=True)
    assert "it is public" in error.message
    with pytest.raises(RecipeError, match="it is public"):
        push(plan_push(release, Target(REPO, "v2")), make=True, private=True)
    assert list(hub.repositories[REPO].branches) == ["main"]
    hub.repositories[REPO].private = True
    assert push(plan_push(release, Target(REPO)), private=True).new


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "there is no Hugging Face token on this machine"),
        ("hf_unknown", "the token is not valid"),
        (READ, "the token may not do this: this token may only read"),
    ],
)
def test_who_may_not_push_is_told_why(
    release: Path, hub: HubStub, monkeypatch: pytest.MonkeyPatch, token: str, message: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    error = refusal(EnvironmentLacksError, release)
    assert message in error.message
    assert error.remedy is not None and "`hf auth login`" in error.remedy
    assert not token or token not in str(error)
    assert list(hub.repositories[REPO].commits) == [1]


def test_a_dry_run_of_a_public_repository_needs_no_token(
    release: Path, hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert plan_push(release, Target(REPO)).remote.state == "there"
    assert not hub.asked("^(POST|PUT)")


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(EnvironmentLacksError) as caught, translated_failures(REPO):
        raise httpx2.ConnectError("[Errno -2] Name or service not known")
    assert "cannot be reached: [Errno -2] Name or service not known" in caught.value.message
    assert caught.value.remedy is not None and "HF_ENDPOINT" in caught.value.remedy


def test_offline_nothing_is_asked(
    release: Path, hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal(EnvironmentLacksError, release)
    assert error.remedy == "unset HF_HUB_OFFLINE"
    assert hub.requests == []


def test_somebody_elses_commit_in_between_is_not_overwritten(release: Path, hub: HubStub) -> None:
    plan = plan_push(release, Target(REPO))
    repository = hub.repositories[REPO]
    repository.commits[2] = {"README.md": b"theirs"}
    repository.branches["main"] = 2
    with pytest.raises(EnvironmentLacksError, match="changed while"):
        push(plan)
    assert repository.files() == {"README.md": b"theirs"}


def test_a_card_that_the_hub_does_not_take_is_told(release: Path, hub: HubStub) -> None:
    (release / "README.md").write_text("# No front matter\n", encoding="utf-8")
    write_sums(release)
    error = refusal(StageError, release)
    assert '"license" is required' in error.message
    assert error.where == "README.md"
    assert not hub.uploaded


def test_only_releases_go_to_repositories(release: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="it is no release"):
        plan_push(tmp_path, Target(REPO))
    for name in ("phi", "org/", "a/b/c", "org/na me", "https://huggingface.co/org/phi"):
        with pytest.raises(RecipeError, match="names no repository"):
            Target(name)
    (release / MODEL).unlink()
    with pytest.raises(StageError, match="cannot be read"):
        plan_push(release, Target(REPO))
