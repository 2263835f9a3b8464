"""The ladder from the reference to the artifact: one change a rung, the same tokens on each.

The rungs are run on the streamed reference as long as only weights change, then on the artifact's
own graph. The rung at which the error jumps is the stage of the conversion where it enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.diagnosis.probe import Probe, rounds_activations
from phiconv.diagnosis.results import Rung, finite
from phiconv.diagnosis.substituted_weights import rounded_to_fp16, with_weights_of
from phiconv.errors import StageError
from phiconv.metrics import PositionStatistics, compare_logits, summary
from phiconv.metrics.positions import NO_TARGET
from phiconv.runtimes import ArtifactFolder, Runtime
from phiconv.runtimes.onnxruntime import Session
from phiconv.runtimes.providers import CPU, ProviderChoice
from phiconv.runtimes.reference import (
    LanguageModelHead,
    Rotary,
    computing,
    decoder_layer,
    embed,
    final_hidden_states,
    hugging_face_config,
    modeling_module,
    rotary_embedding,
    run_layer,
    stored_tensor,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.decoder_graph import DecoderGraph
    from phiconv.diagnosis.weight_part import WeightPart
    from phiconv.report.results import Provenance

REFERENCE = "reference"
DTYPE = "checkpoint dtype"
CAST = "cast"
WEIGHTS = "weights"
QUANTIZED = "quantized weights"
GRAPH = "graph"
ACTIVATIONS = "int8 activations"
PROVIDER = "provider"
LLAMA_CPP = "llama.cpp"


class Ladder:
    """Climbs from the reference to the artifact on one token set.

    Args:
        checkpoint: The reference's checkpoint.
        windows: Token ids [n, T].
        hidden: The reference's final hidden states [n, T, hidden].
        threads: CPU threads.
        advance: Called after each rung with its number of tokens, and its name.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: NDArray[np.int64],
        hidden: NDArray[np.float32],
        *,
        threads: int,
        advance: Callable[[int, str], None],
    ):
        self.rungs: list[Rung] = [
            Rung(REFERENCE, "fp32, the checkpoint's weights", True, 0.0, 0.0, 0.0, 1.0, 1.0)
        ]
        self.weights_stage = WEIGHTS
        self._checkpoint = checkpoint
        self._windows = windows
        self._hidden = hidden
        self._threads = threads
        self._advance = advance
        self._head = LanguageModelHead(checkpoint, threads=threads)

    def checkpoint_dtype(self) -> None:
        """The checkpoint as Hugging Face runs it in bf16, if that is its dtype: a yardstick.

        Not in fp16, in which no CPU multiplies matrices at a bearable speed.
        """
        if self._checkpoint.dtype == "bf16":
            description = "a yardstick: Hugging Face in bf16, weights and activations"
            self._add(DTYPE, description, self._bf16_logits, on_path=False)

    def cast(self) -> None:
        """The checkpoint's weights rounded to fp16."""
        other = rounded_to_fp16(self._checkpoint)
        self._add(CAST, "fp32, weights rounded to fp16", lambda: self._reference_logits(other))

    def weights(self, parts: Sequence[WeightPart]) -> None:
        """The artifact's own weights, dequantized, in the reference."""
        quantized = any(_is_quantized(part) for part in parts)
        self.weights_stage = QUANTIZED if quantized else WEIGHTS
        what = "dequantized" if quantized else "as stored"
        other = with_weights_of(parts, self._checkpoint)
        description = f"fp32, the artifact's weights {what}"
        self._add(self.weights_stage, description, lambda: self._reference_logits(other))

    def graph(self, graph: DecoderGraph, file: Path) -> None:
        """The artifact's graph on the CPU, no activation rounded to int8."""
        description = "the artifact's graph on CPUExecutionProvider"
        if any(rounds_activations(node) for node in graph.model.graph):
            description += ", activations not rounded to int8"
        self._add(GRAPH, description, lambda: self._graph_logits(graph, file))

    def artifact(self, stage: str, folder: Path, choice: ProviderChoice) -> Provenance:
        """The artifact as it is, on a provider."""
        source = ArtifactFolder(folder, self._checkpoint.config.head_dim)
        session = Session(source, choice, self._threads)
        description = f"the artifact as it is on {choice.provider}"
        self._add(stage, description, lambda: session.logits(self._windows))
        return session.provenance()

    def llama_cpp(self, open_runtime: Callable[[], Runtime]) -> None:
        """A GGUF file as it is in llama.cpp, which may refuse to open it."""
        description = "the file as it is in llama.cpp, activations rounded as its kernels do"
        self._add(LLAMA_CPP, description, lambda: open_runtime().logits(self._windows))

    def _add(
        self,
        stage: str,
        description: str,
        logits: Callable[[], Iterable[NDArray[np.float32]]],
        on_path: bool = True,
    ) -> None:
        try:
            positions = self._compare(logits())
        except StageError as error:
            rung = Rung(
                stage, description, on_path, None, None, None, None, None, note=error.message
            )
        else:
            rung = _rung(stage, description, on_path, positions)
        self.rungs.append(rung)
        self._advance(self._windows.size, stage)

    def _compare(self, logits: Iterable[NDArray[np.float32]]) -> PositionStatistics:
        import numpy as np

        parts = []
        for window, hidden, found in zip(self._windows, self._hidden, logits, strict=True):
            expected = self._head.logits(hidden)
            if found.shape != expected.shape:
                raise StageError(f"logits of shape {list(found.shape)}, not {list(expected.shape)}")
            targets = np.append(window[1:], NO_TARGET)
            part = compare_logits(expected, found, targets)
            bad = part.first_non_finite()
            if bad is not None:
                raise StageError(f"the logits are not finite from position {bad} on")
            parts.append(part)
        return PositionStatistics.concatenate(parts)

    def _reference_logits(self, checkpoint: Checkpoint) -> Iterable[NDArray[np.float32]]:
        hidden = final_hidden_states(checkpoint, self._windows, threads=self._threads)
        head = LanguageModelHead(checkpoint, threads=self._threads)
        return (head.logits(window) for window in hidden)

    def _graph_logits(self, graph: DecoderGraph, file: Path) -> Iterable[NDArray[np.float32]]:
        import numpy as np

        probe = Probe(
            graph.model,
            [],
            file,
            provider=CPU,
            threads=self._threads,
            config=self._checkpoint.config,
            exact_activations=True,
        )
        name = str(graph.logits.name)
        return (probe.run(window, [name])[name].astype(np.float32) for window in self._windows)

    def _bf16_logits(self) -> Iterable[NDArray[np.float32]]:
        """Hugging Face's own inference in bf16, layer by layer."""
        import torch

        checkpoint, dtype = self._checkpoint, torch.bfloat16
        with computing("cpu", self._threads):
            config = hugging_face_config(checkpoint)
            rotary = rotary_embedding(config, self._windows.shape[1], "cpu")
            cos, sin = (part.to(dtype) for part in rotary.embeddings)
            rotary = Rotary(rotary.position_ids, (cos, sin))
            stream = embed(checkpoint, self._windows).to(dtype)
            for index in range(config.num_hidden_layers):
                layer = decoder_layer(checkpoint, config, index, "cpu").to(dtype)
                run_layer(layer, config, stream, rotary, "cpu")
            norm = modeling_module().Phi3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            norm.load_state_dict({"weight": stored_tensor(checkpoint, "model.norm.weight")})
            final = norm(stream).to(dtype)
            head = stored_tensor(checkpoint, checkpoint.lm_head).to(dtype)
            return [(window @ head.T).float().numpy() for window in final]


def _is_quantized(part: WeightPart) -> bool:
    try:
        return part.load().format.quantized
    except StageError:
        return False


def _rung(stage: str, description: str, on_path: bool, positions: PositionStatistics) -> Rung:
    return Rung(
        stage=stage,
        description=description,
        on_path=on_path,
        kl_mean=finite(summary.kl_mean(positions)),
        kl_max=finite(summary.kl_max(positions)),
        logit_error_max=finite(summary.logit_error_max(positions)),
        top1_agreement=summary.top1_agreement(positions),
        perplexity_ratio=finite(summary.perplexity_ratio(positions)),
    )
