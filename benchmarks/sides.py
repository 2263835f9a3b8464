"""Who does a piece of work: phiconv, its peers, and the floors below which nobody can be."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.awq import measure as measure_awq
from benchmarks.bare import BUFFER_BYTES
from benchmarks.measure import Usage, run, total
from phiconv.gguf.file_types import FILE_TYPES, FileTypeName

RECIPES = Path(__file__).parent.parent / "recipes"
TOKENS = 8 * 512
"""Tokens of the default token set."""

# The converter knows tokenizers by the tokens of a sample text; the checkpoints have tiny-phi3's.
CONVERT = """
import runpy, sys
folder, *arguments = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""
QUANTIZE = """
import ctypes, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), int(sys.argv[4])
source, target = sys.argv[1].encode(), sys.argv[2].encode()
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)))
"""


@dataclass(frozen=True)
class Peers:
    """Where peers are that this Python does not have itself.

    Attributes:
        llama_cpp: Folder of llama.cpp's sources, for `convert_hf_to_gguf.py`.
        llama_python: A Python with llama-cpp-python, for `llama_model_quantize`.
        olive_python: A Python with olive-ai, where this one has none that works.
        awq_python: A Python with phiconv's dependencies and AutoAWQ.
        threads: Threads for those who take a number.
    """

    llama_cpp: str | None
    llama_python: str | None
    olive_python: str | None
    awq_python: str | None
    threads: int


@dataclass(frozen=True)
class Place:
    """One run of one side.

    Attributes:
        checkpoint: What is converted.
        work: An empty folder for this run.
        peers: Where peers are.
        made: Artifacts that the sides before it made in this round, by side.
        parameters: Weights that a forward pass multiplies with.
    """

    checkpoint: Path
    work: Path
    peers: Peers
    made: Mapping[str, Path]
    parameters: int

    @property
    def log(self) -> Path:
        """Where a command's output goes."""
        return self.work / "log"


@dataclass(frozen=True)
class Done:
    """What a run used, and the artifact it made, if any."""

    usage: Usage
    artifact: Path | None = None


@dataclass(frozen=True)
class Side:
    """One of those who do the work.

    Attributes:
        run: Does it.
        missing: Why it cannot be measured here; None when it can.
        converts: Whether it makes an artifact whose accuracy can be compared.
    """

    run: Callable[[Place], Done]
    missing: Callable[[Peers], str | None] = lambda peers: None
    converts: bool = False


def phiconv(recipe: str) -> Side:
    """A build from cold: an empty workspace, so hashing included, and no validation."""

    def build(place: Place) -> Done:
        usage = run(
            _build_command(place, [recipe], place.work / "out", "--skip-validation"),
            log=place.log,
            env={"PHICONV_HOME": str(place.work / "home")},
        )
        return Done(usage, _artifact_in(place.work / "out" / "artifact"))

    return Side(build, converts=True)


def phiconv_recipes(recipes: Sequence[str], *, single: bool) -> Side:
    """Several recipes validated: by one command, or each by its own from cold."""

    def build(place: Place) -> Done:
        groups = [[recipe] for recipe in recipes] if single else [list(recipes)]
        usages = [
            run(
                _build_command(place, group, place.work / f"out-{index}"),
                log=place.log,
                env={"PHICONV_HOME": str(place.work / f"home-{index}")},
                expected=(0, 4),
            )
            for index, group in enumerate(groups)
        ]
        return Done(total(usages))

    return Side(build)


def phiconv_validation(recipe: str) -> Side:
    """`phiconv validate` from cold of an artifact that was built beforehand, not counted."""

    def validate(place: Place) -> Done:
        built = phiconv(recipe).run(replace(place, work=_folder(place.work / "built")))
        assert built.artifact is not None
        command = [sys.executable, "-m", "phiconv", "validate", str(built.artifact)]
        command += ["--reference", str(place.checkpoint), "--out", str(place.work / "out")]
        command += ["--threads", str(place.peers.threads)]
        usage = run(
            command,
            log=place.log,
            env={"PHICONV_HOME": str(place.work / "home")},
            expected=(0, 4),
        )
        return Done(usage, built.artifact)

    return Side(validate)


def builder(precision: str, provider: str) -> Side:
    """The model builder of onnxruntime-genai."""

    def build(place: Place) -> Done:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(place.checkpoint), "-o", str(place.work / "out")]
        command += ["-c", str(place.work / "cache"), "-p", precision, "-e", provider]
        return Done(run(command, log=place.log), place.work / "out")

    return Side(build, lambda peers: _module_missing("onnxruntime_genai"), converts=True)


def olive(precision: str) -> Side:
    """Olive's command for the same: its ModelBuilder pass."""

    def missing(peers: Peers) -> str | None:
        return None if peers.olive_python else _module_missing("olive")

    def capture(place: Place) -> Done:
        python = place.peers.olive_python or sys.executable
        command = [python, "-m", "olive", "capture-onnx-graph"]
        command += ["-m", str(place.checkpoint), "-o", str(place.work / "out")]
        command += ["--use_model_builder", "--precision", precision, "--conversion_device", "cpu"]
        # It keeps a cache where it runs; every run is to be from cold.
        usage = run([*command, "--disable_telemetry"], log=place.log, folder=place.work)
        return Done(usage, next((place.work / "out").rglob("*.onnx")).parent)

    return Side(capture, missing, converts=True)


def llama_cpp(name: FileTypeName) -> Side:
    """Converter, and where the file is no plain conversion the quantizer after it."""
    direct = name in ("F16", "Q8_0")

    def missing(peers: Peers) -> str | None:
        if not peers.llama_cpp:
            return "no --llama-cpp with llama.cpp's sources"
        if not direct and not peers.llama_python:
            return "no --llama-python with llama-cpp-python"
        return None

    def convert(place: Place) -> Done:
        first, second = place.work / "first.gguf", place.work / "second.gguf"
        command = [sys.executable, "-c", CONVERT, str(place.peers.llama_cpp), str(place.checkpoint)]
        kind = name.lower() if direct else "f16"
        usage = run([*command, "--outtype", kind, "--outfile", str(first)], log=place.log)
        if direct:
            return Done(usage, first)
        command = [str(place.peers.llama_python), "-c", QUANTIZE, str(first), str(second)]
        command += [str(FILE_TYPES[name].number), str(place.peers.threads)]
        return Done(total([usage, run(command, log=place.log)]), second)

    return Side(convert, missing, converts=True)


def awq(windows: int, *, peer: bool = False) -> Side:
    """The stage `awq`, or AutoAWQ as its backend on the same tokens.

    Args:
        windows: Windows of 512 tokens.
        peer: AutoAWQ.
    """

    def missing(peers: Peers) -> str | None:
        return "no --awq-python with AutoAWQ" if peer and not peers.awq_python else None

    def search(place: Place) -> Done:
        calibration = {"windows": windows, "compute": "bf16"}
        parameters = {"group_size": 32, "rounding": "nearest", "calibration": calibration}
        python = sys.executable
        if peer:
            parameters["backend"] = "autoawq"
            python = str(place.peers.awq_python)
        folder, threads = place.work / "awq", place.peers.threads
        found = measure_awq(python, place.checkpoint, folder, parameters, threads)
        return Done(Usage(found["wall"], found["cpu"], found["peak_rss"]), folder / "out")

    return Side(search, missing)


def copy() -> Side:
    """`cp` of what phiconv reads and of what it made."""

    def cp(place: Place) -> Done:
        sources = [*weights_of(place.checkpoint), _made_by_phiconv(place)]
        target = _folder(place.work / "copy")
        return Done(run(["cp", *map(str, sources), str(target)], log=place.log))

    return Side(cp, lambda peers: None if shutil.which("cp") else "no cp")


def read_and_write(*, direct: bool = False) -> Side:
    """Reading the weights and writing the bytes of the artifact, which is neither flushed.

    Args:
        direct: Write past the page cache: then the bytes are on the disk.
    """

    def pass_through(place: Place) -> Done:
        command = [sys.executable, "-m", "benchmarks.bare", "read-write"]
        command += ["--direct"] if direct else []
        paths = [*weights_of(place.checkpoint), _made_by_phiconv(place)]
        return Done(run([*command, *map(str, paths), str(place.work / "written")], log=place.log))

    missing = "no O_DIRECT" if direct and not hasattr(os, "O_DIRECT") else None
    return Side(pass_through, lambda peers: missing)


def bare_passes() -> Side:
    """Hugging Face's and ONNX Runtime's forward passes alone; wall is theirs, without loading."""

    def forward(place: Place) -> Done:
        parts = []
        for name, artifact in (("hugging-face", []), ("onnxruntime", [place.made["phiconv"]])):
            command = [sys.executable, "-m", "benchmarks.bare", name, str(place.checkpoint)]
            usage = run([*command, *map(str, artifact)], log=place.log)
            parts.append(replace(usage, wall=float(place.log.read_text().split()[-1])))
        return Done(total(parts))

    return Side(forward)


def multiplications() -> Side:
    """Floating-point operations of one forward pass at this machine's GEMM rate; only wall."""

    def rate(place: Place) -> Done:
        usage = run([sys.executable, "-m", "benchmarks.bare", "gemm"], log=place.log)
        seconds = 2 * place.parameters * TOKENS / float(place.log.read_text().split()[-1])
        return Done(Usage(seconds, seconds * place.peers.threads, usage.peak_rss))

    return Side(rate)


def divergence(artifact: Path, checkpoint: Path, scratch: Path) -> float | None:
    """Mean KL divergence against Hugging Face in fp32; None where the artifact does not run here.

    Args:
        artifact: A folder with an ONNX model, or a GGUF file.
        checkpoint: What it was made from.
        scratch: Keeps the reference for the next.
    """
    out = scratch / "validation"
    command = [sys.executable, "-m", "phiconv", "validate", str(artifact)]
    command += ["--reference", str(checkpoint), "--out", str(out), "-q"]
    env = {"PHICONV_HOME": str(scratch / "home")}
    run(command, log=scratch / "validation.log", env=env, expected=(0, 4, 5))
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    metrics = report["result"]["validations"][0]["measurement"]["metrics"]
    value = metrics.get("kl_divergence.mean")
    return None if value is None else float(value)


def size_of(artifact: Path) -> int:
    """Bytes of an artifact."""
    files = artifact.rglob("*") if artifact.is_dir() else [artifact]
    return sum(file.stat().st_size for file in files if file.is_file())


def _build_command(place: Place, recipes: Sequence[str], out: Path, *options: str) -> list[str]:
    files = [str(RECIPES / f"{recipe}.yaml") for recipe in recipes]
    command = [sys.executable, "-m", "phiconv", "build", *files, "--out", str(out), *options]
    return [*command, "--model", str(place.checkpoint), "--threads", str(place.peers.threads)]


def _artifact_in(folder: Path) -> Path:
    return next(folder.glob("*.gguf"), folder)


def weights_of(checkpoint: Path) -> list[Path]:
    """The files that hold a checkpoint's weights."""
    return sorted(checkpoint.glob("*.safetensors"))


def read_through(path: Path) -> None:
    """Brings a file into the page cache, as far as it fits."""
    buffer = bytearray(BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _made_by_phiconv(place: Place) -> Path:
    """The file to copy, in the page cache: what phiconv writes goes past it."""
    path = _largest(place.made["phiconv"])
    read_through(path)
    return path


def _largest(artifact: Path) -> Path:
    files = artifact.iterdir() if artifact.is_dir() else [artifact]
    return max(files, key=lambda file: file.stat().st_size)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _module_missing(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed"
