"""Measures `convert-gguf` beside llama.cpp's converter and quantizer, and beside `cp`.

    python -m benchmarks.gguf --llama-cpp DIR --python PYTHON --layers 8

DIR holds llama.cpp's sources, for `convert_hf_to_gguf.py`; PYTHON has llama-cpp-python, for
`llama_model_quantize`. Both sides use two threads and run alternately on one synthetic checkpoint,
each as a process of its own. phiconv starts cold: an empty workspace, hashing included, after one
run that is not counted and leaves the compiled kernels behind.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.measure import Usage, middle, run
from benchmarks.synthetic import Shape, write_checkpoint
from phiconv.gguf.file_types import FILE_TYPES, FileTypeName

RECIPES = Path(__file__).parent.parent / "recipes"
CASES: Mapping[FileTypeName, str] = {
    "Q4_K_M": "gguf-q4_k_m.yaml",
    "Q4_0": "gguf-q4_0.yaml",
    "Q8_0": "gguf-q8_0.yaml",
    "Q6_K": "gguf-q6_k.yaml",
    "F16": "gguf-f16.yaml",
}
THREADS = 2

# The converter knows tokenizers by the tokens of a sample text; the checkpoint has tiny-phi3's.
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


def _phiconv(name: FileTypeName, checkpoint: Path, work: Path) -> tuple[Usage, Path]:
    command = [sys.executable, "-m", "phiconv", "build", str(RECIPES / CASES[name])]
    command += ["--model", str(checkpoint), "--out", str(work / "out"), "--skip-validation"]
    command += ["--threads", str(THREADS)]
    usage = run(command, log=work / "log", env={"PHICONV_HOME": str(work / "home")})
    return usage, next((work / "out" / "artifact").glob("*.gguf"))


def _peer(name: FileTypeName, checkpoint: Path, work: Path, llama_cpp: str, python: str) -> Usage:
    """Converter, and where the file is no plain conversion the quantizer after it."""
    direct = name in ("F16", "Q8_0")
    kind, file = (name.lower() if direct else "f16"), work / "first.gguf"
    command = [sys.executable, "-c", CONVERT, llama_cpp, str(checkpoint)]
    usage = run([*command, "--outtype", kind, "--outfile", str(file)], log=work / "log")
    if direct:
        return usage
    number = str(FILE_TYPES[name].number)
    command = [python, "-c", QUANTIZE, str(file), str(work / "second.gguf"), number, str(THREADS)]
    second = run(command, log=work / "log")
    peak = max(usage.peak_rss, second.peak_rss)
    return Usage(usage.wall + second.wall, usage.cpu + second.cpu, peak)


def _copy(checkpoint: Path, made: Path, work: Path) -> Usage:
    """`cp` of what phiconv reads and of what it writes."""
    weights = sorted(map(str, checkpoint.glob("*.safetensors")))
    return run(["cp", *weights, str(made), str(work)], log=work / "log")


@click.command(help=__doc__)
@click.option("--llama-cpp", required=True, help="Folder of llama.cpp's sources.")
@click.option("--python", required=True, help="A Python with llama-cpp-python.")
@click.option("--layers", default=8, show_default=True, help="Layers; 32 are Phi-3-mini.")
@click.option("--runs", default=1, show_default=True, help="Counted runs; the median is shown.")
@click.option("--only", multiple=True, help="A file type; may be repeated.")
@click.option("--scratch", type=click.Path(path_type=Path), default=Path("bench-gguf"))
def main(
    llama_cpp: str,
    python: str,
    layers: int,
    runs: int,
    only: tuple[FileTypeName, ...],
    scratch: Path,
) -> None:
    """Prints one JSON line a file type."""
    checkpoint = scratch / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, Shape(layers=layers))
    for name in only or CASES:
        usages: dict[str, list[Usage]] = {"phiconv": [], "llama.cpp": [], "cp": []}
        for index in range(runs + 1):
            work = scratch / "run"
            work.mkdir()
            usage, made = _phiconv(name, checkpoint, work)
            if index:
                usages["phiconv"].append(usage)
                usages["cp"].append(_copy(checkpoint, made, work))
                usages["llama.cpp"].append(_peer(name, checkpoint, work, llama_cpp, python))
            shutil.rmtree(work)
        figures = {side: asdict(middle(counted)) for side, counted in usages.items()}
        print(json.dumps({"file_type": name, "layers": layers, **figures}), flush=True)


if __name__ == "__main__":
    main()
