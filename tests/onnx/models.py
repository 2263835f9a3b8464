"""Builds ONNX artifacts of small checkpoints and runs them, apart from phiconv's own runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from phiconv.checkpoint import Checkpoint, resolve
from phiconv.onnx.export import build_graph
from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.target import Precision, Provider
from phiconv.onnx.writer import Written, write_model
from phiconv.stages.stage import SilentProgress


def open_checkpoint(path: Path) -> Checkpoint:
    return resolve(str(path), None, None)


def lay_out(
    path: Path, scratch: Path, provider: Provider = "cpu", precision: Precision = "fp32"
) -> OnnxGraph:
    genai = scratch / f"genai-{provider}-{precision}"
    return build_graph(open_checkpoint(path), provider=provider, precision=precision, genai=genai)


def write(graph: OnnxGraph, path: Path, folder: Path, threads: int = 2) -> Written:
    folder.mkdir(parents=True)
    checkpoint = open_checkpoint(path)
    return write_model(graph, checkpoint, folder, threads=threads, progress=SilentProgress())


def onnx_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence of token ids [T], on the CPU provider."""
    import onnxruntime as ort

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    feed = {}
    for value in session.get_inputs():
        if value.name == "input_ids":
            feed[value.name] = ids[None, :]
        elif value.name == "attention_mask":
            feed[value.name] = np.ones((1, len(ids)), np.int64)
        elif value.name == "position_ids":
            feed[value.name] = np.arange(len(ids), dtype=np.int64)[None, :]
        else:
            _, heads, _, width = value.shape
            if not isinstance(width, int):
                width = _head_size(folder)
            feed[value.name] = np.zeros((1, heads, 0, width), types[value.type])
    (logits,) = session.run(["logits"], feed)
    return np.asarray(logits[0], np.float32)


def _head_size(folder: Path) -> int:
    for node in ir.load(folder / "model.onnx").graph:
        if node.op_type == "GroupQueryAttention":
            heads, scale = node.attributes["num_heads"].as_int(), node.attributes["scale"]
            assert heads
            return round(scale.as_float() ** -2)
    raise AssertionError("no GroupQueryAttention in the graph")


def hugging_face_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of transformers' own model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None, :]).logits[0].numpy()


def initializers(folder: Path) -> dict[str, np.ndarray]:
    """Every initializer of a saved model, with its data."""
    model = ir.load(folder / "model.onnx")
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def assert_same_initializers(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Byte for byte; the rotary caches to what torch's powers and cosines are off by."""
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        if name in ("cos_cache", "sin_cache"):
            angle = np.finfo(np.float32).eps * len(array)
            bound = np.finfo(array.dtype).eps + angle
            np.testing.assert_allclose(ours[name], array, rtol=0, atol=bound, err_msg=name)
        else:
            assert ours[name].tobytes() == array.tobytes(), name
