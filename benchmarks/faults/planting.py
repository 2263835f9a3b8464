"""What a planted fault is: where it may be put, what was changed, what ought to be said of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint

Place = tuple[int | None, str]
"""Layer, or None, and component: `(2, "mlp.down_proj")`, `(None, "lm_head")`."""


@dataclass(frozen=True)
class Truth:
    """What was changed.

    Attributes:
        what: For people.
        components: Any of these is the right name in a diagnosis; empty where none is made.
        layers: One of these must be named with it; empty where it lies in no layer.
        words: For what no diagnosis places: one of these must stand in what the validation says.
    """

    what: str
    components: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


def at(place: Place, what: str, *more: Place) -> Truth:
    """A fault in one place, or as much in any of `more`."""
    places = (place, *more)
    layers = tuple(dict.fromkeys(layer for layer, _ in places if layer is not None))
    text = place[1] if place[0] is None else f"layer {place[0]}, {place[1]}"
    return Truth(f"{text}: {what}", tuple(component for _, component in places), layers)


@dataclass(frozen=True)
class Site:
    """A copy of a clean artifact that a fault is planted in.

    Attributes:
        path: The ONNX model's folder, or the GGUF file; may be changed.
        other: The same kind of artifact of the other checkpoint; may not.
        later: The same kind of artifact of the same checkpoint, trained a little further; not
            there for every kind.
        checkpoint: What the artifact was made from.
        tokens: How often the validation's texts have each token.
        random: Chooses where.
    """

    path: Path
    other: Path
    later: Path
    checkpoint: Checkpoint
    tokens: Sequence[int]
    random: random.Random


Plant = Callable[[Site], Truth | None]
"""Changes a copy; None where such a fault cannot be in this artifact."""
