"""What a weight that is not the one it should be is instead: another tensor, a transpose, ..."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phiconv.diagnosis.block_errors import checkpoint_rows
from phiconv.diagnosis.results import place
from phiconv.diagnosis.weight_part import EMBEDDING, WeightPart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.diagnosis.weight_format import StoredWeight

_SAMPLE = 24
# Cosine from which two rows count as equal: quantizing to 4 bits leaves about 0.996.
_EQUAL = 0.9
# Norm weights are all alike, so they must agree better.
_EQUAL_NORM = 0.02
# A common factor nearer to 1 than this is no explanation.
_FACTOR = 0.05


@dataclass(frozen=True)
class Origin:
    """What a weight holds.

    Attributes:
        text: For people.
        holds: The place of the checkpoint weight it equals, if it is another's.
    """

    text: str
    holds: str | None = None


def find_origin(part: WeightPart, weight: StoredWeight, checkpoint: Checkpoint) -> Origin:
    """Says what a wrong weight holds, from a sample of its rows.

    Tried in turn: its own weight times a factor, with rows or columns in another order, or
    transposed; any other weight of the checkpoint with the same shape.
    """
    import numpy as np

    if len(weight.shape) == 1:
        return _norm_origin(part, weight, checkpoint)
    found = np.nan_to_num(weight.rows(part.start, part.stop))
    own = checkpoint_rows(part, checkpoint, 0, len(part))
    text = _own_changed(found, own)
    if text is not None:
        return Origin(text)
    picked = _picked(len(part))
    sample = found[picked]
    for other in _weights(checkpoint.config, checkpoint):
        if other.shape != found.shape or other.place == part.place:
            continue
        rows = [
            checkpoint.read_rows(other.tensor, other.start + i, other.start + i + 1)[0]
            for i in picked
        ]
        if _mean_cosine(sample, np.array(rows, np.float32)) > _EQUAL:
            return Origin(f"holds the weight of {other.place}", other.place)
    return Origin("equals no weight of this shape in the checkpoint")


def _own_changed(found: NDArray[np.float32], own: NDArray[np.float32]) -> str | None:
    import numpy as np

    picked = _picked(len(own))
    sample = found[picked]
    if not np.any(sample):
        return "is zero"
    cosine = _mean_cosine(sample, own[picked])
    if abs(cosine) > _EQUAL:
        factor = float((sample * own[picked]).sum() / np.square(own[picked]).sum())
        if abs(factor - 1) > _FACTOR:
            return f"is the right weight times {factor:.2g}"
        return "is the right weight, inexactly"
    if found.shape[0] == found.shape[1] and _mean_cosine(sample, own.T[picked]) > _EQUAL:
        return "is the right weight transposed"
    permuted = _order(sample, own)
    if permuted is not None:
        return f"has its rows in another order: row {picked[1]} holds row {permuted[1]}"
    columns = _picked(own.shape[1])
    permuted = _order(found.T[columns], own.T)
    if permuted is not None:
        return f"has its columns in another order: column {columns[1]} holds column {permuted[1]}"
    return None


def _norm_origin(part: WeightPart, weight: StoredWeight, checkpoint: Checkpoint) -> Origin:
    import numpy as np

    found = np.nan_to_num(weight.rows(part.start, part.stop))
    for name, info in checkpoint.tensors.items():
        if info.shape != found.shape or name == part.tensor:
            continue
        other = checkpoint.read(name).astype(np.float32)
        difference = np.linalg.norm(found - other)
        if difference < _EQUAL_NORM * np.linalg.norm(other):
            return Origin(f"holds {name}", name)
    own = checkpoint_rows(part, checkpoint, 0, len(part))
    factor = float((found * own).sum() / np.square(own).sum())
    if np.linalg.norm(found - factor * own) < _EQUAL_NORM * np.linalg.norm(found):
        return Origin(f"is the right weight times {factor:.2g}")
    return Origin("equals no norm's weight in the checkpoint")


@dataclass(frozen=True)
class _CheckpointWeight:
    place: str
    tensor: str
    start: int
    shape: tuple[int, int]


def _weights(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[_CheckpointWeight]:
    """Every matrix of the checkpoint, packed ones whole and in parts."""
    hidden, width = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    vocabulary = (config.vocab_size, hidden)
    yield _CheckpointWeight("embed_tokens", EMBEDDING, 0, vocabulary)
    yield _CheckpointWeight("lm_head", checkpoint.lm_head, 0, vocabulary)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for component, tensor, start, shape in (
            ("self_attn.q_proj", "self_attn.qkv_proj", 0, (q, hidden)),
            ("self_attn.k_proj", "self_attn.qkv_proj", q, (kv, hidden)),
            ("self_attn.v_proj", "self_attn.qkv_proj", q + kv, (kv, hidden)),
            ("self_attn.qkv_proj", "self_attn.qkv_proj", 0, (q + 2 * kv, hidden)),
            ("self_attn.o_proj", "self_attn.o_proj", 0, (hidden, q)),
            ("mlp.gate_proj", "mlp.gate_up_proj", 0, (width, hidden)),
            ("mlp.up_proj", "mlp.gate_up_proj", width, (width, hidden)),
            ("mlp.gate_up_proj", "mlp.gate_up_proj", 0, (2 * width, hidden)),
            ("mlp.down_proj", "mlp.down_proj", 0, (hidden, width)),
        ):
            yield _CheckpointWeight(
                place(layer, component), f"{prefix}.{tensor}.weight", start, shape
            )


def _picked(rows: int) -> list[int]:
    """Indices of a sample of rows, evenly spread."""
    return sorted({index * rows // _SAMPLE for index in range(_SAMPLE)})


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rows, np.where(length == 0, np.float32(1), length))
    return unit


def _mean_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    return float((_unit(left) * _unit(right)).sum(axis=1).mean())


def _order(sample: NDArray[np.float32], rows: NDArray[np.float32]) -> list[int] | None:
    """For each sampled row the row it equals, if nearly all equal some row."""
    import numpy as np

    cosine = _unit(sample) @ _unit(rows).T
    if float(np.median(cosine.max(axis=1))) < _EQUAL:
        return None
    order: list[int] = cosine.argmax(axis=1).tolist()
    return order
