"""Diagnoses an ONNX artifact: how far it is from its checkpoint, and where the error enters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from phiconv.diagnosis.config_lint import lint_config
from phiconv.diagnosis.decoder_graph import DecoderGraph, read_decoder
from phiconv.diagnosis.ladder import ACTIVATIONS, GRAPH, PROVIDER, Ladder
from phiconv.diagnosis.length_lint import lint_lengths
from phiconv.diagnosis.probe import rounds_activations
from phiconv.diagnosis.residual import StreamErrors, layer_errors, stream_errors
from phiconv.diagnosis.results import Diagnosis
from phiconv.diagnosis.sqnr import tensor_errors
from phiconv.diagnosis.verdict import Evidence, find_faults, known_causes, verdict
from phiconv.diagnosis.weight_map import map_weights
from phiconv.diagnosis.wiring_lint import lint_wiring
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.runtimes.onnxruntime import model_file
from phiconv.runtimes.providers import CPU, ProviderChoice
from phiconv.runtimes.reference import final_hidden_states
from phiconv.runtimes.stored_reference import token_set_record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.diagnosis.results import Finding, LayerError, TensorError
    from phiconv.diagnosis.weight_map import WeightPart
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
    run = _Run(graph, checkpoint, file, tokens.windows, provider.provider, threads, progress)
    findings = _lint(graph, checkpoint.config)
    parts = map_weights(graph, checkpoint)
    tensors = run.tensors(parts)
    states, hidden = run.reference()
    # the reference's layers cannot be run on values of another width
    fits = not any(tensor.status == "misfit" for tensor in tensors)
    try:
        stream = run.stream(states) if fits else StreamErrors([], [])
        del states
        ladder, provenance = run.climb(hidden, parts, provider)
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
    faults = find_faults(evidence)
    return Diagnosis(
        artifact=str(artifact),
        checkpoint=checkpoint.source,
        tokens=token_set_record(tokens),
        provenance=provenance,
        ladder=tuple(ladder.rungs),
        layers=tuple(stream.layers),
        operators=tuple(stream.operators),
        tensors=tuple(tensors),
        findings=tuple(findings),
        faults=faults,
        verdict=verdict(evidence, faults),
        versions={name: metadata.version(name) for name in _TOOLS},
    )


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


def compare_weights(
    artifact: Path, checkpoint: Checkpoint, *, threads: int, progress: Progress
) -> list[TensorError]:
    """Every weight of an artifact against the checkpoint's; nothing is run.

    Memory: a weight for each thread, as stored, and twice in fp32 where it is not as good as its
    format allows.

    Args:
        artifact: Its folder.
        checkpoint: What it was made from.
        threads: How many weights are compared at once; does not change the result.
        progress: Told which weights are done.

    Raises:
        StageError: The graph is no decoder that could be read, or data is missing.
    """
    file = model_file(artifact)
    parts = map_weights(read_decoder(_load(file), str(file)), checkpoint)
    return tensor_errors(
        parts,
        checkpoint,
        threads=threads,
        advance=lambda _, place: progress.advance(0, f"weights: {place}"),
    )


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


@dataclass(frozen=True)
class _Run:
    """One diagnosis under way."""

    graph: DecoderGraph
    checkpoint: Checkpoint
    file: Path
    windows: NDArray[np.int64]
    provider: str
    threads: int
    progress: Progress

    def tensors(self, parts: Sequence[WeightPart]) -> list[TensorError]:
        """Every weight against the checkpoint's."""
        self.progress.start(self.checkpoint.nbytes, "bytes")
        return tensor_errors(
            parts, self.checkpoint, threads=self.threads, advance=self.progress.advance
        )

    def reference(self) -> tuple[list[NDArray[np.float32]], NDArray[np.float32]]:
        """The reference's residual stream by layer, and its final hidden states."""
        self.progress.start(self.windows.size * self.checkpoint.config.num_hidden_layers, "tokens")
        states: list[NDArray[np.float32]] = []
        hidden = final_hidden_states(
            self.checkpoint,
            self.windows,
            threads=self.threads,
            advance=self.progress.advance,
            observe=lambda _, stream: states.append(stream.copy()),
        )
        return states, hidden

    def stream(self, states: Sequence[NDArray[np.float32]]) -> StreamErrors:
        """Every layer and step of the artifact."""
        self.progress.start(self.windows.size * len(self.graph.layers), "tokens")
        return stream_errors(
            self.graph,
            self.checkpoint,
            self.file,
            self.windows,
            states,
            provider=self.provider,
            threads=self.threads,
            advance=self.progress.advance,
        )

    def climb(
        self, hidden: NDArray[np.float32], parts: Sequence[WeightPart], choice: ProviderChoice
    ) -> tuple[Ladder, Provenance]:
        """The ladder, and where its last rung ran."""
        self.progress.start(None, "tokens")
        ladder = Ladder(
            self.checkpoint,
            self.windows,
            hidden,
            threads=self.threads,
            advance=self.progress.advance,
        )
        ladder.checkpoint_dtype()
        if half_precision(self.graph):
            ladder.cast()
        ladder.weights(parts)
        rounded = any(rounds_activations(node) for node in self.graph.model.graph)
        if rounded or self.provider != CPU:
            ladder.graph(self.graph, self.file)
        if rounded and self.provider != CPU:
            ladder.artifact(ACTIVATIONS, self.file.parent, ProviderChoice(CPU, CPU))
        stage = PROVIDER if self.provider != CPU else ACTIVATIONS if rounded else GRAPH
        return ladder, ladder.artifact(stage, self.file.parent, choice)


def half_precision(graph: DecoderGraph) -> bool:
    """Whether a graph's activations are fp16."""
    return graph.layers[0].attention.outputs[0].dtype == ir.DataType.FLOAT16


def _load(file: Path) -> ir.Model:
    try:
        return ir.load(file)
    except (OSError, ValueError, DecodeError) as error:
        raise StageError(f"the ONNX model cannot be read: {error}", where=str(file)) from error
