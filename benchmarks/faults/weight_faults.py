"""Faults in weights, for every format alike: each changes one thing of one weight, or of two."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.faults.planting import Place, Site, Truth, at
from benchmarks.faults.stored import Array, Stored, Weights

WeightFault = Callable[[Weights, Weights, Site], Truth | None]
"""Changes the first; the second is the same kind of artifact of another checkpoint."""

_FLOAT_BITS = {2: (10, 15), 4: (23, 31)}  # bytes: bits of the mantissa, the bit of the sign
_MOST_COMMON = 100
_NORMS = ("input_layernorm", "post_attention_layernorm")


def _pick(weights: Weights, chance: random.Random, has: str) -> tuple[Place, Stored] | None:
    """A projection, or seldom the head or the embedding, that has scales, codes or floats."""
    places = [
        place
        for place, weight in weights.matrices.items()
        if getattr(weight, has) is not None and place[1] != "embed_tokens"
    ]
    if not places:
        return None
    place = chance.choice(places)
    return place, weights.matrices[place]


def _flip(name: str) -> WeightFault:
    """One bit of one scale, in its sign, exponent or mantissa."""

    def plant(weights: Weights, _: Weights, site: Site) -> Truth | None:
        chance = site.random
        found = _pick(weights, chance, "scales")
        if found is None or found[1].scales is None:
            return None
        place, scales = found[0], found[1].scales
        mantissa, sign = _FLOAT_BITS[scales.itemsize]
        bit = {
            "sign": sign,
            "exponent": chance.randrange(mantissa, sign),
            "mantissa": chance.randrange(mantissa),
        }[name]
        row, block = chance.randrange(scales.shape[0]), chance.randrange(scales.shape[1])
        scales[row, block] ^= scales.dtype.type(1 << bit)
        return at(place, f"bit {bit} of the scale of row {row}, block {block}")

    return plant


def bit_of_a_weight(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """One bit of one float, or of one code."""
    chance = site.random
    place = chance.choice(weights.linears)
    weight = weights.matrices[place]
    target = weight.codes if weight.dense is None else weight.dense
    assert target is not None
    index = tuple(chance.randrange(extent) for extent in target.shape)
    bit = chance.randrange(8 * target.itemsize)
    words = target.view(f"u{target.itemsize}") if target.itemsize > 1 else target
    words[index] ^= words.dtype.type(1 << bit)
    return at(place, f"bit {bit} of the {'code' if weight.dense is None else 'float'} at {index}")


def corrupt_block(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """Noise in the codes of one block, or in 32 floats."""
    chance = site.random
    place = chance.choice(weights.linears)
    weight = weights.matrices[place]
    noise = np.random.default_rng(chance.randrange(1 << 32))
    row = chance.randrange(weight.rows)
    if weight.codes is not None:
        block = chance.randrange(weight.codes.shape[1])
        weight.codes[row, block] = noise.integers(0, 256, weight.codes.shape[2], np.uint8)
        return at(place, f"noise in the codes of row {row}, block {block}")
    assert weight.dense is not None
    start = 32 * chance.randrange(weight.dense.shape[1] // 32)
    spread = float(weight.dense[row].astype(np.float32).std())
    weight.dense[row, start : start + 32] = noise.normal(0, spread, 32)
    return at(place, f"noise in row {row}, columns {start} to {start + 31}")


def zeroed_row(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """A row of weights is zero."""
    place = site.random.choice(weights.linears)
    weight = weights.matrices[place]
    row = site.random.randrange(weight.rows)
    target = weight.scales if weight.dense is None else weight.dense
    assert target is not None
    target[row] = 0
    return at(place, f"row {row} is zero")


def swapped_rows(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """Two rows of one weight are exchanged."""
    place = site.random.choice(weights.linears)
    weight = weights.matrices[place]
    one, two = site.random.sample(range(weight.rows), 2)
    _exchange_rows(weight, one, two)
    return at(place, f"rows {one} and {two} are exchanged")


def rolled_rows(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """All rows of one weight are shifted by one."""
    place = site.random.choice(weights.linears)
    for array in weights.matrices[place].arrays:
        array[:] = np.roll(array, 1, axis=0)
    return at(place, "every row is shifted by one")


def swapped_columns(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """Two columns of one weight are exchanged, in blocks two bytes of codes of a block."""
    chance = site.random
    place = chance.choice(weights.linears)
    weight = weights.matrices[place]
    if weight.codes is not None:
        block = chance.randrange(weight.codes.shape[1])
        one, two = chance.sample(range(weight.codes.shape[2]), 2)
        _exchange_columns(weight.codes[:, block], one, two)
        return at(place, f"columns of bytes {one} and {two} of block {block} are exchanged")
    assert weight.dense is not None
    one, two = chance.sample(range(weight.dense.shape[1]), 2)
    _exchange_columns(weight.dense, one, two)
    return at(place, f"columns {one} and {two} are exchanged")


def swapped_projections(one: str, two: str) -> WeightFault:
    """Two projections of a layer are exchanged, where they are stored alike."""

    def plant(weights: Weights, _: Weights, site: Site) -> Truth | None:
        places = [place for place in weights.linears if place[1] == one]
        place = site.random.choice(places)
        other = (place[0], two)
        if not _exchange(weights.matrices[place], weights.matrices[other]):
            return None
        return at(place, f"exchanged with {two}", other)

    return plant


def exchanged_layers(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """One projection of two layers is exchanged, in half of the cases every one."""
    chance = site.random
    count = site.checkpoint.config.num_hidden_layers
    one, two = chance.sample(range(count), 2)
    components = [place[1] for place in weights.linears if place[0] == one]
    chosen = components if chance.random() < 0.5 else [chance.choice(components)]
    swapped = [
        name
        for name in chosen
        if _exchange(weights.matrices[one, name], weights.matrices[two, name])
    ]
    if not swapped:
        return None
    places = [(layer, name) for name in swapped for layer in (one, two)]
    return at(places[0], f"exchanged with layer {two}", *places[1:])


def norm_of_another_layer(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """A norm has the weight of the same norm of another layer."""
    name = site.random.choice(_NORMS)
    one, two = site.random.sample(range(site.checkpoint.config.num_hidden_layers), 2)
    weights.norms[one, name][:] = weights.norms[two, name]
    return at((one, name), f"has the weight of layer {two}'s")


def norm_plus_one(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """A norm's weight is one greater, as Gemma's are stored without it."""
    place = site.random.choice(list(weights.norms))
    weights.norms[place][:] += weights.norms[place].dtype.type(1)
    return at(place, "one is added")


def embedding_rows(kind: str) -> WeightFault:
    """The embeddings of two tokens are exchanged: common ones, or ones the texts do not have."""

    def plant(weights: Weights, _: Weights, site: Site) -> Truth | None:
        place = (None, "embed_tokens")
        shared = place not in weights.matrices  # a tied table is stored once, as the head
        table = weights.matrices[(None, "lm_head") if shared else place]
        rare = [token for token, count in enumerate(site.tokens) if count == 0]
        common = sorted(range(len(site.tokens)), key=lambda token: -site.tokens[token])
        one, two = site.random.sample(rare if kind == "rare" else common[:_MOST_COMMON], 2)
        _exchange_rows(table, one, two)
        return at(place, f"rows {one} and {two} are exchanged", (None, "lm_head"))

    return plant


def other_checkpoints_weight(weights: Weights, other: Weights, site: Site) -> Truth | None:
    """One projection, or the head, is another checkpoint's."""
    shared = [
        place
        for place, weight in weights.matrices.items()
        if place in other.matrices and weight.like(other.matrices[place])
    ]
    heads = [place for place in shared if place[1] == "lm_head"]
    place = heads[0] if heads and site.random.random() < 0.5 else site.random.choice(shared)
    for mine, its in zip(weights.matrices[place].arrays, other.matrices[place].arrays, strict=True):
        mine[:] = its
    return at(place, "is another checkpoint's", (None, "embed_tokens"))


def zero_points_off_by_one(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """Every zero point of a weight is one greater."""
    found = _pick(weights, site.random, "codes")
    if found is None:
        return None
    place, weight = found
    if weight.zeros is None or _is_byte_wide(weight):
        return None
    low, high = weight.zeros & 0x0F, weight.zeros >> 4
    weight.zeros[:] = np.minimum(low + 1, 15) | (np.minimum(high + 1, 15) << 4)
    return at(place, "every zero point is one greater")


def nibbles_swapped(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """The two codes of every byte are exchanged."""
    found = _four_bit(weights, site)
    if found is None:
        return None
    place, codes = found
    codes[:] = (codes >> 4) | (codes << 4)
    return at(place, "the two codes of every byte are exchanged")


def codes_signed(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """Codes are stored as signed integers where unsigned ones are read."""
    found = _four_bit(weights, site)
    if found is None:
        return None
    place, codes = found
    codes[:] = codes ^ 0x88
    return at(place, "codes are signed")


def scales_transposed(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """The scales of a weight lie block by block instead of row by row."""
    found = _pick(weights, site.random, "scales")
    if found is None or found[1].scales is None:
        return None
    place, scales = found[0], found[1].scales
    if 1 in scales.shape:
        return None
    scales[:] = np.ascontiguousarray(scales.T).reshape(scales.shape)
    return at(place, "scales are transposed")


def bfloat16_as_float16(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """Floats, or scales, are stored as bfloat16 bits where float16 is read."""
    import ml_dtypes

    place = site.random.choice(weights.linears)
    weight = weights.matrices[place]
    bits: Array | None = weight.scales
    if weight.dense is not None:
        bits = weight.dense.view(f"<u{weight.dense.itemsize}")
    if bits is None or bits.itemsize != 2:
        return None
    bits[:] = bits.view("<f2").astype(ml_dtypes.bfloat16).view("<u2")
    return at(place, "bfloat16 is read as float16")


def transposed(weights: Weights, _: Weights, site: Site) -> Truth | None:
    """A square weight is transposed; only where it is stored as floats."""
    places = [
        place
        for place in weights.linears
        if (values := weights.matrices[place].dense) is not None
        and values.shape[0] == values.shape[1]
    ]
    if not places:
        return None
    place = site.random.choice(places)
    values = weights.matrices[place].dense
    assert values is not None
    values[:] = values.T.copy()
    return at(place, "is transposed")


def _four_bit(weights: Weights, site: Site) -> tuple[Place, Array] | None:
    found = _pick(weights, site.random, "codes")
    if found is None or found[1].codes is None or _is_byte_wide(found[1]):
        return None
    return found[0], found[1].codes


def _is_byte_wide(weight: Stored) -> bool:
    """Whether codes have 8 bits, or 6: blocks of 32 in 16 bytes or of 256 in 128 have 4."""
    assert weight.codes is not None
    return weight.codes.shape[2] not in (16, 64, 128)


def _exchange(one: Stored, two: Stored) -> bool:
    if not one.like(two):
        return False
    for mine, its in zip(one.arrays, two.arrays, strict=True):
        mine[:], its[:] = its.copy(), mine.copy()
    return True


def _exchange_rows(weight: Stored, one: int, two: int) -> None:
    for array in weight.arrays:
        array[[one, two]] = array[[two, one]]


def _exchange_columns(array: Array, one: int, two: int) -> None:
    array[:, [one, two]] = array[:, [two, one]]


WEIGHT_FAULTS: Mapping[str, WeightFault] = {
    "scale: sign bit": _flip("sign"),
    "scale: exponent bit": _flip("exponent"),
    "scale: mantissa bit": _flip("mantissa"),
    "bit of one weight": bit_of_a_weight,
    "corrupt block": corrupt_block,
    "zeroed row": zeroed_row,
    "two rows exchanged": swapped_rows,
    "rows shifted": rolled_rows,
    "two columns exchanged": swapped_columns,
    "gate and up exchanged": swapped_projections("mlp.gate_proj", "mlp.up_proj"),
    "q and k exchanged": swapped_projections("self_attn.q_proj", "self_attn.k_proj"),
    "k and v exchanged": swapped_projections("self_attn.k_proj", "self_attn.v_proj"),
    "layers exchanged": exchanged_layers,
    "norm of another layer": norm_of_another_layer,
    "norm plus one": norm_plus_one,
    "embeddings of common tokens": embedding_rows("common"),
    "embeddings of rare tokens": embedding_rows("rare"),
    "weight of another checkpoint": other_checkpoints_weight,
    "zero points off by one": zero_points_off_by_one,
    "nibbles swapped": nibbles_swapped,
    "codes signed": codes_signed,
    "scales transposed": scales_transposed,
    "bfloat16 as float16": bfloat16_as_float16,
    "weight transposed": transposed,
}
