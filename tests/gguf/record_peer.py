"""Writes peer.json: what llama.cpp's own converter and quantizer make of the test checkpoints.

Not run by the tests, which only read peer.json. It needs llama.cpp's source tree for
`convert_hf_to_gguf.py`, and a Python with llama-cpp-python for `llama_model_quantize`:

    python -m tests.gguf.record_peer --llama-cpp DIR --python PYTHON

The converter is run with `--outtype f32`, so that the quantizer sees the weights as they are; it
knows pre-tokenizers by the tokens of a sample text, and is told that of the test vocabulary, which
it would take for SentencePiece's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phiconv.gguf.file_types import FILE_TYPES
from phiconv.kernels.ggml import TYPES
from tests.gguf.conversions import metadata, tensors
from tests.gguf.peer_cases import (
    CASES,
    CHECKPOINTS,
    FILE,
    WEIGHTED,
    condensed,
    importance,
    summary,
    write_checkpoint,
)

CONVERT = """
import runpy, sys
folder, *arguments = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion.base import TextModel
from conversion.phi import Phi3MiniModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2
sys.argv = ["convert_hf_to_gguf.py", *arguments]
runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""

QUANTIZE = """
import ctypes, json, sys
import llama_cpp
source, target, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
class Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]
params = llama_cpp.llama_model_quantize_default_params()
overrides = [(pattern.encode(), kind) for pattern, kind in settings.pop("overrides", [])]
if overrides:
    array = (Override * (len(overrides) + 1))(*overrides, (None, 0))
    params.tt_overrides = ctypes.cast(array, type(params.tt_overrides))
importance = settings.pop("importance", None)
if importance is not None:
    import numpy as np
    class Entry(ctypes.Structure):
        _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]
    means = dict(np.load(importance))
    entries = [(name.encode(), mean.ctypes.data, mean.size) for name, mean in means.items()]
    table = (Entry * (len(entries) + 1))(*entries, (None, None, 0))
    params.imatrix = ctypes.cast(table, type(params.imatrix))
for name, value in settings.items():
    setattr(params, name, value)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""


def main() -> int:
    """Runs converter and quantizer on every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", required=True, help="folder of llama.cpp's sources")
    parser.add_argument("--python", required=True, help="a Python with llama-cpp-python")
    arguments = parser.parse_args()
    recorded: dict[str, Any] = {"metadata": {}, "tensors": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in CHECKPOINTS:
            source = write_checkpoint(name, folder / name)
            (folder / f"{name}-f32").mkdir()
            target = folder / f"{name}-f32" / "model.gguf"
            options = ["--outtype", "f32", "--model-name", "Phi3", "--outfile", str(target)]
            command = ["-c", CONVERT, arguments.llama_cpp, str(source), *options]
            subprocess.run([sys.executable, *command], check=True, stderr=subprocess.DEVNULL)
            recorded["metadata"][name] = condensed(metadata(target.parent))
            np.savez(folder / f"{name}.npz", **importance(source).means())
        for case, (name, params) in CASES.items():
            source, out = folder / f"{name}-f32", folder / case
            _quantize(arguments.python, source, out, _settings(params))
            recorded["tensors"][case] = summary(tensors(out))
        for case, (name, file_type) in WEIGHTED.items():
            source, out = folder / f"{name}-f32", folder / case
            settings = _settings({"file_type": file_type})
            settings["importance"] = str(folder / f"{name}.npz")
            _quantize(arguments.python, source, out, settings)
            recorded["tensors"][case] = summary(tensors(out))
    text = json.dumps(recorded, indent=1, ensure_ascii=True, sort_keys=True) + "\n"
    FILE.write_text(text, encoding="utf-8", newline="\n")
    return 0


def _quantize(python: str, source: Path, out: Path, settings: Mapping[str, Any]) -> None:
    out.mkdir()
    files = [str(source / "model.gguf"), str(out / "model.gguf")]
    command = [python, "-c", QUANTIZE, *files, json.dumps(settings)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def _settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the stage as `llama_model_quantize_params` has them."""
    settings: dict[str, Any] = {"ftype": FILE_TYPES[params["file_type"]].number, "nthread": 2}
    for ours, theirs in (
        ("token_embedding_type", "token_embedding_type"),
        ("output_type", "output_tensor_type"),
    ):
        if ours in params:
            settings[theirs] = TYPES[params[ours]].type_id
    settings["overrides"] = [
        (_as_regex(entry["match"]), TYPES[entry["type"]].type_id)
        for entry in params.get("overrides", ())
    ]
    return settings


def _as_regex(pattern: str) -> str:
    return "^" + pattern.replace(".", r"\.").replace("*", ".*") + "$"


if __name__ == "__main__":
    sys.exit(main())
