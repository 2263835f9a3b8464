"""Diagnoses a GGUF file: how far it is from its checkpoint, and where the error enters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.diagnosis.examination import Examination
from phiconv.diagnosis.gguf_lint import lint_gguf
from phiconv.diagnosis.gguf_stream import gguf_stream_errors
from phiconv.diagnosis.gguf_weight_map import map_gguf_weights
from phiconv.diagnosis.ladder import LLAMA_CPP
from phiconv.diagnosis.layer_errors import StreamErrors
from phiconv.diagnosis.verdict import Evidence
from phiconv.errors import StageError
from phiconv.gguf.tensors import GgufTensors
from phiconv.runtimes import ArtifactFolder
from phiconv.runtimes.dequantized import stand_in
from phiconv.runtimes.llama_cpp import LlamaCppModel, LlamaFile, gguf_file, provenance

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.results import Diagnosis
    from phiconv.diagnosis.weight_part import WeightPart
    from phiconv.runtimes.providers import ProviderChoice
    from phiconv.stages.stage import Progress
    from phiconv.tokens import TokenSet


def diagnose_gguf(
    artifact: Path,
    checkpoint: Checkpoint,
    *,
    provider: ProviderChoice,
    tokens: TokenSet,
    threads: int,
    progress: Progress,
) -> Diagnosis:
    """Compares a GGUF file with its checkpoint, stage by stage, layer by layer, weight by weight.

    Without llama.cpp it is its weights that are looked at, and its metadata. Memory: one layer of
    the checkpoint in fp32, the file in llama.cpp, the residual stream of all layers (tokens x
    layers x hidden_size x 8 bytes), and up to 512 MiB of inner values.

    Args:
        artifact: The file, or the folder that holds it.
        checkpoint: What it was made from.
        provider: llama.cpp, or what stands in for it.
        tokens: What everything is measured on; a few windows are enough.
        threads: CPU threads.
        progress: Told what is being done.

    Raises:
        StageError: It is no sound GGUF file, or llama.cpp failed.
        EnvironmentLacksError: llama.cpp is missing and required.
    """
    file = gguf_file(artifact)
    findings = lint_gguf(file, checkpoint)
    tensors = GgufTensors(file)
    parts = map_gguf_weights(tensors, checkpoint)
    examination = Examination(artifact, checkpoint, tokens, threads, progress)
    errors = examination.weights(parts)
    states, hidden = examination.reference()
    source = ArtifactFolder(file, checkpoint=checkpoint)
    ladder = examination.ladder(hidden)
    ladder.checkpoint_dtype()
    ladder.weights(parts)
    stream = StreamErrors([], [])
    if provider.provider == provider.target:
        where = provenance(provider, threads)
        ladder.llama_cpp(lambda: LlamaCppModel(source, provider, threads))
        # the reference's layers cannot be run on values of another width
        if not any(error.status == "misfit" for error in errors):
            stream = _look_inside(file, tensors, examination, states)
    else:
        where = stand_in(provider, threads)
    evidence = Evidence(
        rungs=ladder.rungs,
        layers=stream.layers,
        operators=stream.operators,
        tensors=errors,
        findings=findings,
        weights_stage=ladder.weights_stage,
        graph_stage=LLAMA_CPP,
    )
    return examination.conclusion(evidence, where)


def gguf_weights(artifact: Path, checkpoint: Checkpoint) -> list[WeightPart]:
    """Every weight of a GGUF file and what it should equal; none is read yet.

    Args:
        artifact: The file, or the folder that holds it.
        checkpoint: What it was made from.

    Raises:
        StageError: It is no GGUF file.
    """
    return map_gguf_weights(GgufTensors(gguf_file(artifact)), checkpoint)


def _look_inside(
    file: Path,
    tensors: GgufTensors,
    examination: Examination,
    states: Sequence[NDArray[np.float32]],
) -> StreamErrors:
    layers = examination.checkpoint.config.num_hidden_layers
    examination.progress.start(examination.windows.size * layers, "tokens")
    try:
        return gguf_stream_errors(
            LlamaFile(file),
            tensors,
            examination.checkpoint,
            examination.windows,
            states,
            threads=examination.threads,
            advance=examination.progress.advance,
        )
    except StageError:
        return StreamErrors([], [])  # the ladder's last rung says why
