"""What every diagnosis measures, whatever runs the artifact: its weights, and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.diagnosis.ladder import Ladder
from phiconv.diagnosis.results import Diagnosis
from phiconv.diagnosis.sqnr import tensor_errors
from phiconv.diagnosis.verdict import Evidence, find_faults, verdict
from phiconv.runtimes.reference import final_hidden_states
from phiconv.runtimes.stored_reference import token_set_record

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.results import TensorError
    from phiconv.diagnosis.weight_part import WeightPart
    from phiconv.report.results import Provenance
    from phiconv.stages.stage import Progress
    from phiconv.tokens import TokenSet

_TOOLS = ("torch", "transformers")


@dataclass(frozen=True)
class Examination:
    """One diagnosis under way.

    Attributes:
        artifact: The artifact's folder or file.
        checkpoint: What it was made from.
        tokens: What everything is measured on.
        threads: CPU threads.
        progress: Told what is being done.
    """

    artifact: Path
    checkpoint: Checkpoint
    tokens: TokenSet
    threads: int
    progress: Progress

    @property
    def windows(self) -> NDArray[np.int64]:
        """Token ids [n, T]."""
        return self.tokens.windows

    def weights(self, parts: Sequence[WeightPart]) -> list[TensorError]:
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

    def ladder(self, hidden: NDArray[np.float32]) -> Ladder:
        """The ladder at its first rung, the reference with those final hidden states."""
        self.progress.start(None, "tokens")
        return Ladder(
            self.checkpoint,
            self.windows,
            hidden,
            threads=self.threads,
            advance=self.progress.advance,
        )

    def conclusion(self, evidence: Evidence, provenance: Provenance) -> Diagnosis:
        """What was measured, the faults that follow, and the verdict."""
        faults = find_faults(evidence)
        return Diagnosis(
            artifact=str(self.artifact),
            checkpoint=self.checkpoint.source,
            tokens=token_set_record(self.tokens),
            provenance=provenance,
            ladder=tuple(evidence.rungs),
            layers=tuple(evidence.layers),
            operators=tuple(evidence.operators),
            tensors=tuple(evidence.tensors),
            findings=tuple(evidence.findings),
            faults=faults,
            verdict=verdict(evidence, faults),
            versions={name: metadata.version(name) for name in _TOOLS},
        )
