"""The quantization error of every weight of an artifact, and what is wrong with the wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from phiconv.diagnosis.block_errors import BlockErrors, expected_sqnr_db, measure
from phiconv.diagnosis.channel_scales import fit_channel_scales, undone_in_readers
from phiconv.diagnosis.origin import find_origin
from phiconv.diagnosis.results import TensorError, TensorStatus, finite, place
from phiconv.errors import StageError

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.weight_format import StoredWeight
    from phiconv.diagnosis.weight_part import WeightPart

# GPTQ, which rounds with an eye on the output, is up to 5 dB noisier than plain rounding where a
# layer's inputs are alike (measured on o_proj of tiny-phi3).
MARGIN_DB = 8.0
# Plain rounding stays within this of what a sample of rows expects; a weight that does not may
# have been rescaled by little.
_PLAIN_DB = 1.0
# Floats: bf16 has about 56 dB, and anything that good came from the right weight.
FLOAT_DB = 40.0
# Below this a weight has nothing to do with the checkpoint's.
WRONG_DB = 3.0
# What reads a norm's output.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
# Once its factors are undone, hardly a block of a rescaled weight is bad.
_RESCALED_BAD = 0.02
# A few bad blocks are a corruption, many are a wrong weight.
_FEW_BLOCKS = 0.5
# How many wrong weights are searched for what they hold instead.
_EXPLAINED = 12


def tensor_errors(
    parts: Sequence[WeightPart],
    checkpoint: Checkpoint,
    *,
    threads: int,
    advance: Callable[[int, str], None],
) -> list[TensorError]:
    """Measures every part, several at a time, and explains those that are wrong.

    Args:
        parts: From `map_weights`.
        checkpoint: Where the weights come from.
        threads: How many parts are measured at once; does not change the result.
        advance: Called, from any thread, with the number of weights done and their name.
    """

    def error(part: WeightPart) -> TensorError:
        result = tensor_error(part, checkpoint)
        advance(len(part) * checkpoint.tensors[part.tensor].row_nbytes, part.place)
        return result

    with ThreadPoolExecutor(max(threads, 1), "phiconv-sqnr") as pool:
        errors = list(pool.map(error, parts))
    return _explained(errors, parts, checkpoint)


def tensor_error(part: WeightPart, checkpoint: Checkpoint) -> TensorError:
    """Measures one part."""
    info = checkpoint.tensors[part.tensor]
    rows = (part.tensor_start, part.tensor_start + len(part))
    try:
        weight = part.load()
    except StageError as error:
        return TensorError(
            part.component, part.layer, "", "", part.tensor, rows, None, None,
            "unreadable", error.message,
        )  # fmt: skip
    found = TensorError(
        part.component, part.layer, weight.name, str(weight.format), part.tensor, rows, None, None,
        "ok",
    )  # fmt: skip
    if weight.shape[0] < part.stop or weight.shape[1:] != info.shape[1:]:
        shape = [rows[1] - rows[0], *info.shape[1:]]
        detail = f"its shape is {list(weight.shape)}, the checkpoint's {shape}"
        return replace(found, status="misfit", detail=detail)
    expected = expected_sqnr_db(part, weight, checkpoint)
    errors = measure(part, weight, checkpoint, expected_db=expected)
    if errors.finite and errors.error == 0:
        return found
    found = replace(found, sqnr_db=finite(errors.sqnr_db), expected_db=finite(expected))
    if not errors.finite:
        return replace(found, status="not finite", detail="it holds NaN or infinity")
    status = _status(errors, expected, weight)
    plain = not weight.format.quantized or errors.sqnr_db > expected - _PLAIN_DB
    if status == "ok" and plain:
        return found
    return _rescaled(found, part, weight, checkpoint) or replace(
        found, status=status, detail=_worst(errors)
    )


def _status(errors: BlockErrors, expected: float, weight: StoredWeight) -> TensorStatus:
    least = expected - MARGIN_DB if weight.format.quantized else min(FLOAT_DB, expected - MARGIN_DB)
    if errors.bad_blocks and errors.bad_blocks < _FEW_BLOCKS * errors.blocks:
        # the rest being as it should be, the bad blocks are what is wrong
        return "corrupt" if errors.sqnr_db_without_bad >= least - MARGIN_DB else "wrong"
    if errors.sqnr_db < WRONG_DB:
        return "wrong"
    return "low" if errors.sqnr_db < least else "ok"


def _rescaled(
    found: TensorError, part: WeightPart, weight: StoredWeight, checkpoint: Checkpoint
) -> TensorError | None:
    """The error once channel scales are taken out, if that explains it."""
    if len(weight.shape) == 1:
        return None
    scales = fit_channel_scales(part, weight, checkpoint)
    if scales is None:
        return None
    expected = math.inf if found.expected_db is None else found.expected_db
    errors = measure(part, weight, checkpoint, scales, expected_db=expected)
    before = -math.inf if found.sqnr_db is None else found.sqnr_db
    if _status(errors, expected, weight) != "ok" or errors.sqnr_db < before + _PLAIN_DB:
        return None
    # a few huge values fit any factors, and would be all of the signal
    undone = measure(part, weight, checkpoint, scales, undone=True)
    if undone.bad_blocks > _RESCALED_BAD * undone.blocks:
        return None
    detail = "rescaled channel by channel, as AWQ does; the figure is without the scales"
    return replace(found, status="rescaled", sqnr_db=finite(errors.sqnr_db), detail=detail)


def _worst(errors: BlockErrors) -> str:
    if errors.worst is None or not errors.bad_blocks:
        return ""
    row, first, last = errors.worst
    verb = "is" if errors.bad_blocks == 1 else "are"
    return (
        f"{errors.bad_blocks} of {errors.blocks} blocks {verb} wrong, "
        f"the worst in row {row}, columns {first} to {last}"
    )


def _explained(
    errors: Sequence[TensorError], parts: Sequence[WeightPart], checkpoint: Checkpoint
) -> list[TensorError]:
    """Says of the first few wrong weights what they hold instead."""
    explained = _without_rescaled_norms(errors, parts, checkpoint)
    wrong = [i for i, error in enumerate(explained) if error.status in ("wrong", "low")]
    holds: dict[str, str] = {}
    for index in wrong[:_EXPLAINED]:
        origin = find_origin(parts[index], parts[index].load(), checkpoint)
        explained[index] = replace(explained[index], detail=origin.text)
        if origin.holds is not None:
            holds[explained[index].place] = origin.holds
    for index in wrong[:_EXPLAINED]:
        error = explained[index]
        other = holds.get(error.place)
        if other is not None and holds.get(other) == error.place:
            detail = f"{error.detail}: the two are swapped"
            explained[index] = replace(error, detail=detail)
    return explained


def _without_rescaled_norms(
    errors: Sequence[TensorError], parts: Sequence[WeightPart], checkpoint: Checkpoint
) -> list[TensorError]:
    """The errors, where a norm that only holds the other half of its readers' scales is none."""
    by_place = {part.place: part for part in parts}

    def undone(error: TensorError, norm: WeightPart) -> bool:
        places = (place(error.layer, name) for name in _READERS.get(error.component, ()))
        readers = [by_place[name] for name in places if name in by_place]
        return undone_in_readers(norm, readers, checkpoint)

    detail = "rescaled with the weights that read it"
    return [
        replace(error, status="rescaled", detail=detail)
        if error.status in ("wrong", "low", "corrupt") and undone(error, part)
        else error
        for error, part in zip(errors, parts, strict=True)
    ]
