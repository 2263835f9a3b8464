"""The command line as a user meets it, on the real stages and the bundled checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phiconv.cli.boundary import DEBUG_VARIABLE
from tests.terminal import Terminal
from tests.toy_stages import assert_whole

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-phi3"
INT4 = ROOT / "recipes" / "int4-cpu.yaml"
BUILD = ("build", str(INT4), "--model", str(TINY))


@pytest.fixture(scope="module")
def built(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a build by `python -m phiconv` in a process of its own."""
    out = tmp_path_factory.mktemp("out")
    done = subprocess.run(
        [sys.executable, "-m", "phiconv", *BUILD, "--out", str(out)],
        env={**os.environ, "PHICONV_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "int4.onnx: done in" in done.stderr
    assert "passed on CPUExecutionProvider" in done.stdout
    return out


def test_build_makes_artifact_report_and_manifest(built: Path) -> None:
    assert_whole(built)
    names = {path.name for path in (built / "artifact").iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"}
    manifest = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["verdict"] == "passed"
    assert manifest["release_path"] == "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
    text = json.dumps(manifest)
    assert str(ROOT) not in text
    assert str(built) not in text
    report = json.loads((built / "report" / "report.json").read_text(encoding="utf-8"))
    kinds = {record["kind"] for record in report["result"]["tensor_kinds"]}
    assert kinds >= {"attention", "mlp", "lm_head", "embedding", "norm"}


def test_a_second_build_hits_everything(built: Path, phiconv: Terminal) -> None:
    before = (built / "report" / "report.json").read_bytes()
    done = phiconv(*BUILD, "--out", str(built))
    assert done.code == 0
    assert done.err.count(": cached, ") == 5
    assert "all cached" in done.out
    assert (built / "report" / "report.json").read_bytes() == before
    plan = phiconv("plan", str(INT4), "--model", str(TINY), "--json")
    [document] = json.loads(plan.out)
    assert {step["state"] for step in document["steps"]} == {"hit"}
    assert document["disk_bytes"] == 0


def test_a_failed_gate_publishes_and_exits_with_4(
    built: Path, tmp_path: Path, phiconv: Terminal
) -> None:
    setting = ("--set", "check.gates.kl_divergence.mean.max=1e-9")
    done = phiconv(*BUILD, "--out", str(tmp_path / "out"), *setting, "--quiet")
    assert done.code == 4
    assert done.err == ""
    assert "failed on CPUExecutionProvider" in done.out
    assert "failed: kl_divergence.mean measured" in done.out
    assert "limit max 1e-09, provider CPUExecutionProvider, tokens default 8x512" in done.out
    assert_whole(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["verdict"] == "failed"


def test_a_missing_provider_exits_with_5(built: Path, tmp_path: Path, phiconv: Terminal) -> None:
    settings = ("--set", "onnx.provider=dml", "--set", "check.provider=dml", "--set")
    plan = ("plan", str(INT4), "--model", str(TINY), *settings)
    build = (*BUILD, "--out", str(tmp_path / "out"), *settings)
    assert (
        "missing: DmlExecutionProvider, stage 'check' cannot run without"
        in phiconv(*plan, "check.when_missing=require").out
    )
    done = phiconv(*build, "check.when_missing=require")
    assert done.code == 5
    assert "stage 'check' needs DmlExecutionProvider, which is not present" in done.err
    assert not (tmp_path / "out").exists()
    done = phiconv(*build, "check.when_missing=fallback-cpu")
    assert done.code == 0
    assert "passed on CPUExecutionProvider, target DmlExecutionProvider not present" in done.out
    assert "    graph          notes  0 errors, 1 warning\n" in done.out
    assert "      graph: warning: attention window of self_attn.attention" in done.out
    done = phiconv(*build, "check.when_missing=skip")
    assert done.code == 5
    assert "not run, target DmlExecutionProvider not present" in done.out


def test_a_missing_or_broken_model_is_told(tmp_path: Path, phiconv: Terminal) -> None:
    done = phiconv("build", str(INT4), "--model", "./absent", "--out", str(tmp_path / "out"))
    assert done.code == 5
    broken = shutil.copytree(TINY, tmp_path / "broken")
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    done = phiconv("build", str(INT4), "--model", str(broken), "--out", str(tmp_path / "out"))
    assert done.code == 3
    assert "model.safetensors" in done.err
    assert not (tmp_path / "out").exists()


def test_every_error_of_all_recipes_is_listed(tmp_path: Path, phiconv: Terminal) -> None:
    text = INT4.read_text(encoding="utf-8")
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(text.replace("block_size", "blok_size").replace("uses: quantize", "uses: qant"))
    two.write_text(text.replace("kl_divergence.mean: {max", "kl_divergence.mean: {mx"))
    done = phiconv("build", str(one), str(two), "--model", str(TINY))
    assert done.code == 2
    assert "there is no stage 'qant'" in done.err
    assert "stages.check.with.gates.kl_divergence.mean.mx: unknown key" in done.err
    assert "remedy: did you mean 'max'?" in done.err
    assert "\n2 errors\n" in done.err


@pytest.mark.parametrize(
    "arguments",
    [("build",), ("nonsense",), ("build", str(INT4), "--threads", "0"), ("cache", "gc", "-x")],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], phiconv: Terminal) -> None:
    done = phiconv(*arguments)
    assert done.code == 2
    assert "Usage: phiconv" in done.err


def test_an_unexpected_error_is_one_message_and_a_traceback_on_demand(
    phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(workspace: object) -> None:
        raise ZeroDivisionError("one by nought")

    monkeypatch.setattr("phiconv.doctor.examine", fail)
    done = phiconv("doctor")
    assert done.code == 3
    assert done.err.startswith("error: unexpected ZeroDivisionError: one by nought\n")
    assert "please report it" in done.err
    assert "Traceback" not in done.err
    for verbose in (("--verbose", "doctor"), ("doctor", "-v")):
        assert "Traceback" in phiconv(*verbose).err
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    assert "Traceback" in phiconv("doctor").err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "x.json"),
            5,
            "error: Permission denied\n  where: x.json\n",
        ),
        (OSError(errno.EMFILE, "Too many open files"), 5, "error: Too many open files\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 3, "error: unexpected FileNotFound"),
        (EOFError("Ran out of input"), 3, "error: unexpected EOFError: Ran out of input\n"),
    ],
)
def test_what_the_machine_refuses_is_no_defect(
    error: Exception, code: int, message: str, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(workspace: object) -> None:
        raise error

    monkeypatch.setattr("phiconv.doctor.examine", fail)
    done = phiconv("doctor")
    assert done.code == code
    assert done.err.lstrip().startswith(message)


def test_cache_is_listed_and_collected(built: Path, home: Path, phiconv: Terminal) -> None:
    listed = phiconv("cache", "ls")
    assert listed.code == 0
    assert str(home) in listed.out
    for step in ("onnx", "int4", "int4.onnx", "reference", "check"):
        assert f"  {step}  " in listed.out
    dry = phiconv("cache", "gc", "--max-size", "1KB", "--dry-run")
    assert dry.code == 0
    assert "artifacts would be removed" in dry.out
    assert phiconv("cache", "ls").out.splitlines()[-1] == listed.out.splitlines()[-1]
    kept = phiconv("cache", "gc", "--older-than", "30d", "--max-size", "1TB")
    assert kept.out.startswith("0 artifacts removed, 0 B\n")
    assert phiconv("cache", "gc", "--max-size", "plenty").code == 2


def test_inspect_shows_the_artifact_and_the_checkpoint(built: Path, phiconv: Terminal) -> None:
    done = phiconv("inspect", str(built / "artifact"))
    assert done.code == 0
    for text in ("com.microsoft::MatMulNBits", "int4 block 32", "bits a weight", "context_length"):
        assert text in done.out
    document = json.loads(phiconv("inspect", str(built / "artifact"), "--json").out)
    assert document["operators"]["com.microsoft::GroupQueryAttention"] == 4
    assert "Phi3ForCausalLM" in phiconv("inspect", str(TINY)).out
    assert phiconv("inspect", str(built / "report")).code == 2


def test_doctor_shows_the_machine(phiconv: Terminal, home: Path) -> None:
    done = phiconv("doctor")
    assert done.code == 0
    for text in ("onnxruntime", "CPUExecutionProvider", "torch", "memory", str(home)):
        assert text in done.out
    findings = json.loads(phiconv("doctor", "--json").out)
    assert {"topic": "providers", "name": "CPUExecutionProvider", "value": "usable",
            "ok": True} in findings  # fmt: skip


def test_schemas_are_printed(phiconv: Terminal) -> None:
    recipe = json.loads(phiconv("schema").out)
    assert recipe == json.loads((ROOT / "docs" / "recipe.schema.json").read_text("utf-8"))
    assert phiconv("schema", "report").code == 0


HEAVY = {"onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "torch", "transformers", "numba",
         "scipy", "matplotlib", "safetensors"}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], HEAVY | {"numpy", "pydantic", "pydantic_core", "rich", "yaml", "psutil"}),
        (["schema"], HEAVY | {"numpy"}),
        (["plan", str(INT4), "--model", str(TINY)], HEAVY),
    ],
)
def test_light_commands_import_nothing_heavy(
    arguments: list[str], unwanted: set[str], home: Path
) -> None:
    program = f"""
import sys
from phiconv.cli import main
try:
    main({arguments!r})
except SystemExit as ended:
    assert ended.code == 0, ended.code
print("imported:", *{{name.split(".")[0] for name in sys.modules}})
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PHICONV_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert not imported & unwanted
