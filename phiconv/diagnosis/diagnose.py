"""Diagnoses an ONNX artifact: how far it is from its checkpoint, and where the error enters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from phiconv.diagnosis.config_lint import lint_config
from phiconv.diagnosis.decoder_graph import DecoderGraph, read_decoder
from phiconv.diagnosis.examination import Examination
from phiconv.diagnosis.ladder import ACTIVATIONS, GRAPH, PROVIDER, Ladder
from phiconv.diagnosis.layer_errors import StreamErrors
from phiconv.diagnosis.length_lint import lint_lengths
from phiconv.diagnosis.probe import rounds_activations
from phiconv.diagnosis.residual import layer_errors, stream_errors
from phiconv.diagnosis.results import Diagnosis
from phiconv.diagnosis.verdict import Evidence, known_causes
from phiconv.diagnosis.weight_map import map_weights
from phiconv.diagnosis.wiring_lint import lint_wiring
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.runtimes.onnxruntime import model_file
from phiconv.runtimes.providers import CPU, ProviderChoice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.diagnosis.results import Finding, LayerError
    from phiconv.diagnosis.weight_part import WeightPart
    from phiconv.report.results import Provenance
    from phiconv.stages.stage import Progress
    from phiconv.tokens import TokenSet

_TOOLS = ("torch", "transformers")


def diagnose(
    artifact: Path,
    checkpoint: Checkpoint,
    *,
    provider: ProviderChoice,
    tokens: TokenSet,
    threads: int,
    progress: Progress,
) -> Diagnosis:
    """Compares an artifact with its checkpoint, stage by stage, layer by layer, weight by weight.

    Any decoder made by phiconv or the ONNX Runtime GenAI model builder, or built of the same
    operators, is read by its structure. Nothing is written, neither weights nor model are copied.
    Memory: one layer of the checkpoint in fp32, the artifact in its runtime, the residual stream
    of all layers (tokens x layers x hidden_size x 8 bytes), and up to 512 MiB of inner values.

    Args:
        artifact: Its folder.
        checkpoint: What it was made from.
        provider: Where it runs; `provider.provider` must not be None.
        tokens: What everything is measured on; a few windows are enough.
        threads: CPU threads; do not change the result but for the runtime's own.
        progress: Told what is being done.

    Raises:
        StageError: The graph is no decoder that could be read, or the runtime failed.
        EnvironmentLacksError: The provider is missing.
    """
    if provider.provider is None:
        raise EnvironmentLacksError(f"{provider.target} is not present on this machine")
    file = model_file(artifact)
    graph = read_decoder(_load(file), str(file))
    examination = Examination(artifact, checkpoint, tokens, threads, progress)
    findings = _lint(graph, checkpoint.config)
    parts = map_weights(graph, checkpoint)
    tensors = examination.weights(parts)
    states, hidden = examination.reference()
    # the reference's layers cannot be run on values of another width
    fits = not any(tensor.status == "misfit" for tensor in tensors)
    stream = StreamErrors([], [])
    try:
        if fits:
            progress.start(tokens.windows.size * len(graph.layers), "tokens")
            stream = stream_errors(
                graph,
                checkpoint,
                file,
                tokens.windows,
                states,
                provider=provider.provider,
                threads=threads,
                advance=progress.advance,
            )
        del states
        ladder = examination.ladder(hidden)
        provenance = _climb(ladder, graph, file, parts, provider)
    except StageError as error:
        if causes := known_causes(findings, tensors):
            error.message = f"{error.message}; {causes}"
        raise
    evidence = Evidence(
        rungs=ladder.rungs,
        layers=stream.layers,
        operators=stream.operators,
        tensors=tensors,
        findings=findings,
        weights_stage=ladder.weights_stage,
    )
    return examination.conclusion(evidence, provenance)


def lint_artifact(artifact: Path, config: ModelConfig) -> list[Finding]:
    """What an artifact's graph says otherwise than a configuration; nothing is run.

    Args:
        artifact: Its folder.
        config: The configuration of the checkpoint it was made from.

    Raises:
        StageError: The graph is no decoder that could be read.
    """
    file = model_file(artifact)
    return _lint(read_decoder(_load(file), str(file)), config)


def artifact_weights(artifact: Path, checkpoint: Checkpoint) -> list[WeightPart]:
    """Every weight of an artifact and what it should equal; none is read yet.

    Args:
        artifact: Its folder.
        checkpoint: What it was made from.

    Raises:
        StageError: The graph is no decoder that could be read.
    """
    file = model_file(artifact)
    return map_weights(read_decoder(_load(file), str(file)), checkpoint)


def measure_layers(
    artifact: Path,
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    *,
    provider: str,
    threads: int,
) -> list[LayerError]:
    """The error of an artifact's residual stream after every layer, and what each layer adds.

    The part of `diagnose` that costs little. Memory: the artifact in its runtime, one layer of the
    checkpoint in fp32, and the residual stream of all layers (tokens x layers x hidden_size x
    12 bytes).

    Args:
        artifact: Its folder.
        checkpoint: What it was made from.
        windows: Token ids [n, T]; one short window will do.
        provider: Where it runs, by ONNX Runtime's name.
        threads: CPU threads.

    Returns:
        The embedding, then the layers that graph and checkpoint both have, in order.

    Raises:
        StageError: The graph is no decoder that could be read, is of another width, or the runtime
            failed.
        EnvironmentLacksError: The provider is missing.
    """
    file = model_file(artifact)
    graph = read_decoder(_load(file), str(file))
    return layer_errors(graph, checkpoint, file, windows, provider=provider, threads=threads)


def _lint(graph: DecoderGraph, config: ModelConfig) -> list[Finding]:
    return [
        *lint_config(graph, config),
        *lint_lengths(graph, config),
        *lint_wiring(graph, config),
    ]


def _climb(
    ladder: Ladder,
    graph: DecoderGraph,
    file: Path,
    parts: Sequence[WeightPart],
    choice: ProviderChoice,
) -> Provenance:
    """Every rung; where the last of them ran."""
    ladder.checkpoint_dtype()
    if half_precision(graph):
        ladder.cast()
    ladder.weights(parts)
    rounded = any(rounds_activations(node) for node in graph.model.graph)
    if rounded or choice.provider != CPU:
        ladder.graph(graph, file)
    if rounded and choice.provider != CPU:
        ladder.artifact(ACTIVATIONS, file.parent, ProviderChoice(CPU, CPU))
    stage = PROVIDER if choice.provider != CPU else ACTIVATIONS if rounded else GRAPH
    return ladder.artifact(stage, file.parent, choice)


def half_precision(graph: DecoderGraph) -> bool:
    """Whether a graph's activations are fp16."""
    return graph.layers[0].attention.outputs[0].dtype == ir.DataType.FLOAT16


def _load(file: Path) -> ir.Model:
    try:
        return ir.load(file)
    except (OSError, ValueError, DecodeError) as error:
        raise StageError(f"the ONNX model cannot be read: {error}", where=str(file)) from error
