"""Exports a checkpoint: its graph for one execution provider, and what ships beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.onnx.decoder import Decoder
from phiconv.onnx.genai_config import write_genai_config
from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.graph_writer import GraphWriter
from phiconv.onnx.target import ExportTarget, Precision, Provider
from phiconv.onnx.tokenizer_files import write_tokenizer_files

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint


def build_graph(
    checkpoint: Checkpoint, *, provider: Provider, precision: Precision, genai: Path
) -> OnnxGraph:
    """Lay out the ONNX graph of a Phi-3 checkpoint for one execution provider.

    Args:
        checkpoint: An opened checkpoint; no weight is read.
        provider: ``cpu``, ``cuda`` or ``dml``; decides how attention and rotary embedding are
            expressed.
        precision: Type of graph inputs, outputs and activations.
        genai: Folder to create, for genai_config.json and the tokenizer files.

    Raises:
        CheckpointError: The tokenizer's files or generation_config.json are missing or broken.
    """
    target = ExportTarget(provider, precision)
    genai.mkdir(parents=True)
    tokenizer = write_tokenizer_files(checkpoint, genai)
    write_genai_config(checkpoint, target, tokenizer, genai)
    writer = GraphWriter(target.dtype)
    Decoder(writer, checkpoint.config, checkpoint.lm_head, target).write()
    return OnnxGraph(writer.model, writer.weights, genai)
