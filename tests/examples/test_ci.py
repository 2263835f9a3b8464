"""The CI examples: the shell pipeline run for real, and both linted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from phiconv.verify import verify
from tests.push.hub_stub import WRITE, HubStub, serve

ROOT = Path(__file__).parent.parent.parent
CI = ROOT / "examples" / "ci"
PIPELINE, WORKFLOW = CI / "pipeline.sh", CI / "github-actions.yml"
TINY = ROOT / "examples" / "tiny-phi3"
# dash knows no more than POSIX
SHELL = shutil.which("dash") or shutil.which("sh")
NAME = "ci"
RECIPE = """\
schema: 1
name: ci
model: {source: microsoft/Phi-3-mini-4k-instruct}
stages:
  - {id: onnx, uses: export-onnx, with: {provider: cpu}}
  - {id: int4, uses: quantize, with: {bits: 4, block_size: 32, lm_head: {bits: 8}}}
  - id: check
    uses: validate
    with:
      windows: 2
      window_length: 64
      layer_errors: false
      gates: {kl_divergence.mean: {max: 0.1}}
release: {path: cpu_and_mobile/cpu-int4-rtn-block-32}
"""

needs_shell = pytest.mark.skipif(SHELL is None or os.name == "nt", reason="there is no POSIX shell")


def tool(name: str) -> str:
    """A linter that the dev extra installs beside Python."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found is not None, f"{name} comes with phiconv[dev]"
    return found


@dataclass
class Runner:
    """A machine of a CI system: a checkout with recipes, and a workspace that is kept."""

    folder: Path
    home: Path
    settings: dict[str, str] = field(default_factory=dict)

    def __call__(self, step: str, **settings: str) -> subprocess.CompletedProcess[str]:
        assert SHELL is not None
        environment = {
            **{name: value for name, value in os.environ.items() if name != "GITHUB_ACTIONS"},
            "PHICONV": f"{sys.executable} -m phiconv",
            "PHICONV_HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "MODEL": str(TINY),
            **self.settings,
            **settings,
        }
        return subprocess.run(
            [SHELL, str(PIPELINE), step],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def write_recipe(self, old: str = "", new: str = "") -> None:
        recipe = self.folder / "recipes" / "ci.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        assert old in RECIPE
        recipe.write_text(RECIPE.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace that a CI system keeps from run to run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def runner(tmp_path: Path, kept: Path) -> Runner:
    found = Runner(tmp_path, kept)
    found.write_recipe()
    return found


@needs_shell
def test_builds_are_gated_and_their_reports_collected(runner: Runner) -> None:
    done = runner("all")
    assert done.returncode == 0, done.stderr
    assert f"{NAME}: not in baseline, nothing to compare with" in done.stdout
    assert "no TAG: nothing is released" in done.stdout
    reports = runner.folder / "reports"
    report = (reports / "report.md").read_text(encoding="utf-8")
    assert report.startswith(f"## ✅ {NAME}: passed on CPUExecutionProvider")
    assert (reports / "junit" / f"{NAME}.xml").read_bytes().startswith(b"<?xml")
    assert (reports / f"{NAME}.html").is_file()
    assert not (runner.folder / "release").exists()


@needs_shell
def test_a_failed_gate_is_reported_and_not_released(runner: Runner) -> None:
    runner.write_recipe("{max: 0.1}", "{max: 1e-9}")
    done = runner("all", TAG="v1")
    assert done.returncode == 4
    assert "exit code 4: nothing is released" in done.stderr
    report = (runner.folder / "reports" / "report.md").read_text(encoding="utf-8")
    assert "failed on CPUExecutionProvider" in report
    assert not (runner.folder / "release").exists()


@needs_shell
def test_what_is_wrong_ends_with_its_code(runner: Runner, tmp_path: Path) -> None:
    assert runner("nonsense").returncode == 2
    assert runner("build", MODEL="./absent").returncode == 5
    assert runner("build", LOCKED="1").returncode == 2
    runner.write_recipe("uses: quantize", "uses: quantise")
    done = runner("all")
    assert done.returncode == 2
    assert "there is no stage 'quantise'" in done.stderr
    assert not (tmp_path / "reports").exists()


@needs_shell
def test_a_tag_releases_and_the_next_build_is_held_against_it(
    runner: Runner, tmp_path: Path
) -> None:
    """Version 1 goes to the Hub; then rounding gets worse within the gate, which is not enough."""
    hub = HubStub()
    with serve(hub) as url:
        done = runner(
            "all",
            TAG="v1",
            BASE_MODEL="microsoft/Phi-3-mini-4k-instruct",
            HUB_REPO="org/phi",
            PUSH="--create --private",
            HF_ENDPOINT=url,
            HF_HUB_OFFLINE="0",
            HF_TOKEN=WRITE,
            HF_HOME=str(tmp_path / "huggingface"),
        )
    assert done.returncode == 0, done.stdout + done.stderr
    release = runner.folder / "release"
    assert verify(release).problems == ()
    repository = hub.repositories["org/phi"]
    assert repository.private
    assert repository.messages == ["v1"]
    pushed = repository.files()
    assert set(pushed) - {".gitattributes"} == {
        path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()
    }
    assert pushed["README.md"] == (release / "README.md").read_bytes()
    assert WRITE not in done.stdout + done.stderr

    release.rename(runner.folder / "baseline")
    done = runner("all")
    assert done.returncode == 0, done.stderr
    assert "no worse than the baseline" in done.stdout
    runner.write_recipe("lm_head: {bits: 8}", "lm_head: {bits: 4}")
    done = runner("all", TAG="v2")
    assert done.returncode == 4
    assert "failed: kl_divergence.mean is worse by" in done.stdout
    report = (runner.folder / "reports" / "report.md").read_text(encoding="utf-8")
    assert "passed on CPUExecutionProvider" in report
    assert "Compared with the last release" in report
    assert "worse than the baseline by more than allowed" in report
    assert not release.exists()


STAND_IN = """
import os, pathlib, sys
command = sys.argv[1]
if command == "build":
    for name in ("one", "two"):
        report = pathlib.Path("dist", name, "report")
        report.mkdir(parents=True)
        for file in ("report.json", "report.md", "junit.xml", "report.html"):
            (report / file).write_text(name)
if command == "compare":
    sys.exit(int(os.environ["COMPARE_" + pathlib.Path(sys.argv[2]).name.upper()]))
if command == "release":
    pathlib.Path("release").mkdir()
sys.exit(int(os.environ.get(command.upper(), "0")))
"""


@needs_shell
@pytest.mark.parametrize(
    ("build", "compare", "code"),
    [
        (0, (0, 0), 0),
        (4, (0, 0), 4),
        (0, (4, 0), 4),
        (0, (4, 5), 5),
        (5, (4, 0), 5),
        (3, (4, 5), 3),
    ],
)
def test_the_worst_exit_code_decides(
    runner: Runner, tmp_path: Path, build: int, compare: tuple[int, int], code: int
) -> None:
    """With a stand-in for phiconv, as no real build has all of these ends."""
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    for name in ("one", "two"):
        (tmp_path / "baseline" / "reports" / name).mkdir(parents=True)
        (tmp_path / "baseline" / "reports" / name / "report.json").touch()
    done = runner(
        "all",
        PHICONV=f"{sys.executable} stand_in.py",
        TAG="v1",
        BUILD=str(build),
        COMPARE_ONE=str(compare[0]),
        COMPARE_TWO=str(compare[1]),
    )
    assert done.returncode == code, done.stderr
    assert (tmp_path / "release").exists() == (code == 0)
    assert sorted(path.name for path in (tmp_path / "reports" / "junit").iterdir()) == [
        "one.xml",
        "two.xml",
    ]


def test_the_pipeline_is_plain_posix_shell() -> None:
    done = subprocess.run(
        [tool("shellcheck"), "--shell=sh", "--severity=style", str(PIPELINE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_workflow_is_valid_and_asks_for_no_more_than_it_needs() -> None:
    """By GitHub's schema, and by zizmor's audits: pinned actions, permissions, injections."""
    done = subprocess.run(
        [tool("zizmor"), "--offline", "--strict-collection", "--no-progress",
         "--persona=pedantic", str(WORKFLOW)],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_the_workflow_satisfies_actionlint() -> None:
    done = subprocess.run(
        ["actionlint", str(WORKFLOW)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_workflow_runs_the_pipeline_and_what_is_there() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert ROOT / workflow["env"]["PIPELINE"] == PIPELINE
    recipes = [
        entry["recipe"] for entry in workflow["jobs"]["build"]["strategy"]["matrix"]["include"]
    ]
    for recipe in recipes:
        assert (ROOT / "recipes" / f"{recipe}.yaml").is_file()
    text = WORKFLOW.read_text(encoding="utf-8")
    for step in ("build", "compare", "collect", "release"):
        assert f'sh "$PIPELINE" {step}' in text
        assert f"\n{step}() {{\n" in PIPELINE.read_text(encoding="utf-8")


GH = """\
#!/bin/sh
echo "$*" >>asked
case "$*" in *--paginate*) cat known ;; esac
"""


@pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="it is a bash script")
@pytest.mark.parametrize(
    ("known", "asked"),
    [
        ("", "api --method POST repos/org/phi/issues/7/comments -F body=@comment.md"),
        ("42\n", "api --method PATCH repos/org/phi/issues/comments/42 -F body=@comment.md"),
    ],
)
@pytest.mark.parametrize("folders", [["reports-a", "reports-b"], ["."]])
def test_the_comment_of_a_pull_request_is_replaced(
    tmp_path: Path, known: str, asked: str, folders: list[str]
) -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    [script] = [step["run"] for step in workflow["jobs"]["report"]["steps"] if "run" in step]
    (tmp_path / "gh").write_text(GH, encoding="utf-8")
    (tmp_path / "gh").chmod(0o755)
    (tmp_path / "known").write_text(known, encoding="utf-8")
    for folder in folders:
        (tmp_path / "collected" / folder).mkdir(parents=True)
        (tmp_path / "collected" / folder / "report.md").write_text(f"## {folder}\n", "utf-8")
    subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "NUMBER": "7",
             "GH_REPO": "org/phi"},
        check=True,
    )  # fmt: skip
    assert (tmp_path / "asked").read_text(encoding="utf-8").splitlines()[-1] == asked
    comment = (tmp_path / "comment.md").read_text(encoding="utf-8")
    assert comment == "<!-- phiconv -->\n" + "".join(f"## {folder}\n" for folder in folders)
