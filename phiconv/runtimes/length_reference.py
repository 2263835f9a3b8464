"""The reference around a model's boundaries of length, on disk.

For each boundary the tokens up to some positions beyond it, and the final hidden states of as many
positions on either side. The first of them come from a text that ends at the boundary, the others
from the longer text: with LongRoPE these are two computations, since the whole text is rotated by
the factors of its length. That is what Hugging Face computes for a prompt, and also what its
generate() continues with, which empties the cache at the switch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import StageError
from phiconv.runtimes.length_limits import Boundary, boundaries

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.runtimes.reference import Device

PROBE_POSITIONS = 32
"""How many positions are compared on each side of a boundary: enough for a median."""

REACH = 8192
"""A boundary beyond this many tokens is not probed; the family's are at 2,047 and 4,096."""

_METADATA_FILE = "boundaries.json"


@dataclass(frozen=True)
class BoundaryReference:
    """What the artifact is compared with around one boundary at position b.

    Attributes:
        boundary: Which.
        tokens: Token ids, int64 [b + above].
        hidden: Final hidden states of positions [b - below, b + above), float32 [., hidden].
        below: How many positions before the boundary.
    """

    boundary: Boundary
    tokens: NDArray[np.int64]
    hidden: NDArray[np.float32]
    below: int

    @property
    def start(self) -> int:
        """The first position that is compared."""
        return self.boundary.position - self.below


def probed_boundaries(config: ModelConfig) -> tuple[Boundary, ...]:
    """Those within `REACH`."""
    return tuple(found for found in boundaries(config) if found.position <= REACH)


def probe_length(config: ModelConfig, boundary: Boundary) -> int:
    """Tokens of the longer text."""
    return min(boundary.position + PROBE_POSITIONS, config.max_position_embeddings)


def compute(
    checkpoint: Checkpoint,
    boundary: Boundary,
    tokens: NDArray[np.int64],
    *,
    device: Device,
    threads: int,
    advance: Callable[[int, str], None] | None = None,
) -> BoundaryReference:
    """Runs the reference around one boundary.

    Args:
        checkpoint: An opened checkpoint.
        boundary: Which.
        tokens: Token ids [T], longer than the boundary's position.
        device: Where to compute.
        threads: CPU threads; do not change the result.
        advance: Told the tokens done in each layer.
    """
    import numpy as np

    from phiconv.runtimes.reference import final_hidden_states

    position = boundary.position
    below = min(PROBE_POSITIONS, position)

    def states(length: int) -> NDArray[np.float32]:
        found: NDArray[np.float32] = final_hidden_states(
            checkpoint, tokens[None, :length], device=device, threads=threads, advance=advance
        )[0]
        return found

    longer = states(len(tokens))
    shorter = states(position) if boundary.kind == "LongRoPE switch" else longer
    hidden = np.concatenate([shorter[position - below : position], longer[position:]])
    return BoundaryReference(boundary, tokens, hidden, below)


def save(folder: Path, references: Sequence[BoundaryReference]) -> None:
    """Writes references into an empty folder; equal arguments give equal bytes."""
    import numpy as np

    entries = []
    for index, reference in enumerate(references):
        np.save(folder / f"tokens-{index}.npy", reference.tokens, allow_pickle=False)
        np.save(folder / f"hidden-{index}.npy", reference.hidden, allow_pickle=False)
        boundary = reference.boundary
        entries.append(
            {"kind": boundary.kind, "position": boundary.position, "below": reference.below}
        )
    text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
    (folder / _METADATA_FILE).write_text(text, encoding="utf-8", newline="\n")


def load(folder: Path) -> tuple[BoundaryReference, ...]:
    """Reads references back.

    Raises:
        StageError: A file is missing or is not what `save` wrote.
    """
    import numpy as np

    try:
        entries = json.loads((folder / _METADATA_FILE).read_text(encoding="utf-8"))
        return tuple(
            BoundaryReference(
                Boundary(entry["kind"], entry["position"]),
                np.load(folder / f"tokens-{index}.npy", allow_pickle=False),
                np.load(folder / f"hidden-{index}.npy", allow_pickle=False),
                entry["below"],
            )
            for index, entry in enumerate(entries)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"not a reference: {error!r}", where=str(folder)) from error
