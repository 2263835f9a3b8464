"""Weights that are right, rescaled, broken or another's are told apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis.block_errors import decibel, expected_sqnr_db, measure
from phiconv.diagnosis.results import TensorError
from phiconv.diagnosis.sqnr import tensor_error, tensor_errors
from phiconv.diagnosis.stored_weight import BlockWeight, DenseWeight
from phiconv.diagnosis.weight_format import Format, StoredWeight
from phiconv.diagnosis.weight_part import WeightPart
from phiconv.errors import StageError
from phiconv.kernels import matmulnbits
from tests.phi3_checkpoints import write_phi3_checkpoint

Change = Callable[[np.ndarray], np.ndarray]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("sqnr") / "checkpoint"
    return Checkpoint(write_phi3_checkpoint(path, num_key_value_heads=4))


@dataclass(frozen=True)
class Place:
    component: str
    tensor: str
    start: int
    rows: int


O_PROJ = Place("self_attn.o_proj", "model.layers.0.self_attn.o_proj.weight", 0, 128)
Q_PROJ = Place("self_attn.q_proj", "model.layers.0.self_attn.qkv_proj.weight", 0, 128)
K_PROJ = Place("self_attn.k_proj", "model.layers.0.self_attn.qkv_proj.weight", 128, 128)
UP_PROJ = Place("mlp.up_proj", "model.layers.0.mlp.gate_up_proj.weight", 256, 256)
NORM = Place("input_layernorm", "model.layers.0.input_layernorm.weight", 0, 128)


def rows_of(checkpoint: Checkpoint, place: Place, layer: int = 0) -> np.ndarray:
    tensor = place.tensor.replace("layers.0", f"layers.{layer}")
    rows = checkpoint.read_rows(tensor, place.start, place.start + place.rows)
    return np.asarray(rows, np.float32)


def quantized(rows: np.ndarray, bits: int, block_size: int, symmetric: bool) -> BlockWeight:
    shapes = matmulnbits.layout(*rows.shape, bits=bits, block_size=block_size)
    packed, scales = np.empty(shapes.packed, np.uint8), np.empty(shapes.scales, np.float32)
    zero_points = None if symmetric else np.empty(shapes.zero_points, np.uint8)
    matmulnbits.quantize_rows(
        np.ascontiguousarray(rows),
        bits=bits,
        block_size=block_size,
        symmetric=symmetric,
        search="none",
        packed=packed,
        scales=scales,
        zero_points=zero_points,
    )
    return BlockWeight(
        "weight_Q",
        Format(bits, "int", block_size, symmetric, "f32"),
        rows.shape[1],
        packed.reshape(len(rows), -1),
        scales,
        zero_points,
        float(1 << (bits - 1)),
    )


def dense(array: np.ndarray) -> DenseWeight:
    return DenseWeight("weight", Format(8 * array.dtype.itemsize, "f32"), array)


def part(place: Place, weight: StoredWeight) -> WeightPart:
    return WeightPart(place.component, 0, lambda: weight, 0, place.rows, place.tensor, place.start)


def errors(checkpoint: Checkpoint, *parts: WeightPart) -> list[TensorError]:
    return tensor_errors(parts, checkpoint, threads=2, advance=lambda amount, what: None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_rounding_has_the_sqnr_expected_of_its_format(
    checkpoint: Checkpoint, bits: int, block_size: int, symmetric: bool
) -> None:
    weight = quantized(rows_of(checkpoint, UP_PROJ), bits, block_size, symmetric)
    error = tensor_error(part(UP_PROJ, weight), checkpoint)
    assert error.status == "ok"
    assert error.sqnr_db == pytest.approx(error.expected_db, abs=0.2)
    # every bit is worth 6 dB
    assert {4: 15, 8: 40}[bits] < error.sqnr_db < {4: 25, 8: 50}[bits]


def test_sqnr_is_the_ratio_of_energies(checkpoint: Checkpoint) -> None:
    rows = rows_of(checkpoint, UP_PROJ)
    weight = quantized(rows, 4, 32, True)
    found = measure(part(UP_PROJ, weight), weight, checkpoint)
    stored = weight.rows(0, 256).astype(np.float64)
    expected = 10 * math.log10((rows.astype(np.float64) ** 2).sum() / ((stored - rows) ** 2).sum())
    assert found.sqnr_db == pytest.approx(expected, rel=1e-7)
    assert found.blocks == 256 * 4
    assert decibel(1.0, 0.0) == math.inf


def test_equal_weights_have_no_error(checkpoint: Checkpoint) -> None:
    for place in (O_PROJ, NORM):
        error = tensor_error(part(place, dense(rows_of(checkpoint, place))), checkpoint)
        assert (error.status, error.sqnr_db, error.expected_db) == ("ok", None, None)


def test_fp16_is_expected_to_be_as_good_as_fp16(checkpoint: Checkpoint) -> None:
    rows = rows_of(checkpoint, UP_PROJ)
    # a bf16 checkpoint is exact in fp16 but for tiny weights, so scale it beside the grid
    values = (rows * np.float32(1.0001)).astype(np.float16)
    weight = DenseWeight("weight", Format(16, "f16"), values)
    error = tensor_error(part(UP_PROJ, weight), checkpoint)
    assert error.status == "ok"
    assert error.sqnr_db is not None and error.sqnr_db > 60


@pytest.mark.parametrize("factor", [0.5, -1.0])
def test_a_scale_that_is_halved_or_negative_is_found(checkpoint: Checkpoint, factor: float) -> None:
    weight = quantized(rows_of(checkpoint, UP_PROJ), 4, 32, True)
    weight.scales[7, 2] *= factor
    error = tensor_error(part(UP_PROJ, weight), checkpoint)
    assert error.status == "corrupt"
    assert error.detail == "1 of 1024 blocks is wrong, the worst in row 7, columns 64 to 95"


def test_one_wrong_number_of_a_weight_of_floats_is_found(checkpoint: Checkpoint) -> None:
    rows = rows_of(checkpoint, UP_PROJ)
    rows[7, 40] *= -1
    error = tensor_error(part(UP_PROJ, dense(rows)), checkpoint)
    assert error.status == "corrupt"
    assert error.detail == "1 of 1024 blocks is wrong, the worst in row 7, columns 32 to 63"


def scaled_block(rows: np.ndarray) -> np.ndarray:
    rows[7, 32:64] *= 20
    return rows


def permuted(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 3, axis=0)


def permuted_columns(rows: np.ndarray) -> np.ndarray:
    return np.roll(rows, 5, axis=1)


def infinite(rows: np.ndarray) -> np.ndarray:
    rows[3, 3] = np.inf
    return rows


@pytest.mark.parametrize(
    ("change", "status", "detail"),
    [
        (
            scaled_block,
            "corrupt",
            "1 of 512 blocks is wrong, the worst in row 7, columns 32 to 63",
        ),
        (np.transpose, "wrong", "is the right weight transposed"),
        (np.negative, "wrong", "is the right weight times -1"),
        (lambda rows: rows * 2, "wrong", "is the right weight times 2"),
        (np.zeros_like, "wrong", "is zero"),
        (permuted, "wrong", "has its rows in another order: row 5 holds row 2"),
        (permuted_columns, "wrong", "has its columns in another order: column 5 holds column 0"),
        (infinite, "not finite", "it holds NaN or infinity"),
        (lambda rows: rows[:, :100], "misfit", "its shape is [128, 100], the checkpoint's"),
        (
            lambda rows: RNG.standard_normal(rows.shape, np.float32),
            "wrong",
            "equals no weight of this shape in the checkpoint",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("int4", [False, True])
def test_what_is_wrong_is_named(
    checkpoint: Checkpoint, change: Change, status: str, detail: str, int4: bool
) -> None:
    changed = np.ascontiguousarray(change(rows_of(checkpoint, O_PROJ)))
    if int4 and (status == "not finite" or changed.shape[1] == 100):
        weight: StoredWeight = dense(changed)
    else:
        weight = quantized(changed, 4, 32, True) if int4 else dense(changed)
    (error,) = errors(checkpoint, part(O_PROJ, weight))
    assert error.status == status
    assert error.is_fault
    assert error.detail.startswith(detail)


def test_another_weight_is_named_and_a_swap_seen(checkpoint: Checkpoint) -> None:
    q, k = rows_of(checkpoint, Q_PROJ), rows_of(checkpoint, K_PROJ)
    swapped = errors(
        checkpoint,
        part(Q_PROJ, quantized(k, 4, 32, True)),
        part(K_PROJ, quantized(q, 4, 32, True)),
    )
    assert [error.detail for error in swapped] == [
        "holds the weight of layer 0, self_attn.k_proj: the two are swapped",
        "holds the weight of layer 0, self_attn.q_proj: the two are swapped",
    ]
    other = dense(rows_of(checkpoint, UP_PROJ, layer=1))
    (error,) = errors(checkpoint, part(UP_PROJ, other))
    assert error.detail == "holds the weight of layer 1, mlp.up_proj"


def test_norms_are_told_apart(checkpoint: Checkpoint) -> None:
    (other,) = errors(checkpoint, part(NORM, dense(rows_of(checkpoint, NORM, layer=1))))
    assert other.detail == "holds model.layers.1.input_layernorm.weight"
    (twice,) = errors(checkpoint, part(NORM, dense(2 * rows_of(checkpoint, NORM))))
    assert twice.detail == "is the right weight times 2"


@pytest.mark.parametrize("int4", [False, True])
def test_channel_scales_are_no_fault(checkpoint: Checkpoint, int4: bool) -> None:
    """What AWQ does: columns times s, rows and the norm in front divided by theirs."""
    columns = np.exp(RNG.standard_normal(128) / 3).astype(np.float32)
    rows = np.exp(RNG.standard_normal((256, 1)) / 3).astype(np.float32)
    changed = rows_of(checkpoint, UP_PROJ) * columns / rows
    weight = quantized(changed, 4, 32, True) if int4 else dense(changed)
    norm = rows_of(checkpoint, NORM) / columns
    up = part(UP_PROJ, weight)
    after = Place("post_attention_layernorm", NORM.tensor, 0, 128)
    found = errors(checkpoint, up, part(after, dense(norm)))
    assert [error.status for error in found] == ["rescaled", "rescaled"]
    if int4:
        expected = expected_sqnr_db(up, weight, checkpoint)
        assert found[0].sqnr_db == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_small_channel_scales_are_no_fault_either(checkpoint: Checkpoint, spread: float) -> None:
    """Scales that hide in the rounding of the weights show in the norm in front."""
    columns = np.exp(RNG.standard_normal(128) * spread).astype(np.float32)
    norm, *readers = errors(
        checkpoint,
        part(NORM, dense(rows_of(checkpoint, NORM) / columns)),
        *(
            part(reader, quantized(rows_of(checkpoint, reader) * columns, 4, 32, True))
            for reader in (Q_PROJ, K_PROJ)
        ),
    )
    assert norm.status == "rescaled"
    for found in readers:
        assert found.sqnr_db is not None and found.expected_db is not None
        assert found.sqnr_db > found.expected_db - 1.1
        assert not found.is_fault


def test_a_norm_that_its_readers_do_not_undo_is_a_fault(checkpoint: Checkpoint) -> None:
    columns = np.exp(RNG.standard_normal(128) / 3).astype(np.float32)
    q = quantized(rows_of(checkpoint, Q_PROJ) * columns, 4, 32, True)
    right = part(NORM, dense(rows_of(checkpoint, NORM) / columns))
    for wrong in (rows_of(checkpoint, NORM) * columns, rows_of(checkpoint, NORM) / columns[::-1]):
        norm, reader = errors(checkpoint, part(NORM, dense(wrong)), part(Q_PROJ, q))
        assert norm.is_fault
        assert reader.status == "rescaled"
    assert errors(checkpoint, right, part(Q_PROJ, q))[0].status == "rescaled"
    (alone,) = errors(checkpoint, right)
    assert alone.is_fault


def test_a_fault_in_a_rescaled_weight_is_seen(checkpoint: Checkpoint) -> None:
    columns = np.exp(RNG.standard_normal(128) / 3).astype(np.float32)
    changed = rows_of(checkpoint, UP_PROJ) * columns
    changed[::2] = RNG.standard_normal((128, 128))
    (error,) = errors(checkpoint, part(UP_PROJ, quantized(changed, 4, 32, True)))
    assert error.is_fault


@pytest.mark.parametrize("exponent", [8, 16])
def test_one_huge_block_is_not_explained_by_channel_scales(
    checkpoint: Checkpoint, exponent: int
) -> None:
    """It is all of the energy, so factors that fit it alone would seem to fit the weight."""
    changed = rows_of(checkpoint, UP_PROJ).copy()
    changed[17, :64] *= 2.0**exponent
    (error,) = errors(checkpoint, part(UP_PROJ, quantized(changed, 4, 32, True)))
    assert error.status == "corrupt"
    assert error.detail.startswith("2 of 1024 blocks are wrong, the worst in row 17, columns ")


def test_errors_that_are_unlike_each_other_are_no_corruption(checkpoint: Checkpoint) -> None:
    """As GPTQ leaves them where some channels are far greater than others."""
    rows = rows_of(checkpoint, UP_PROJ)
    spread = np.exp(0.5 * RNG.standard_normal((256, 4, 1)))
    noise = RNG.standard_normal((256, 4, 32)) * spread * 0.2 * rows.std()
    changed = (rows + noise.reshape(rows.shape)).astype(np.float32)
    (error,) = errors(checkpoint, part(UP_PROJ, quantized(changed, 4, 32, True)))
    assert error.status in ("ok", "low")
    assert error.sqnr_db is not None and error.sqnr_db < 15


def test_an_unreadable_weight_is_said_to_be(checkpoint: Checkpoint) -> None:
    def load() -> StoredWeight:
        raise StageError("a MatMulNBits of 3 bits is not read here")

    error = tensor_error(
        WeightPart("mlp.up_proj", 0, load, 0, 256, UP_PROJ.tensor, 256), checkpoint
    )
    assert (error.status, error.detail) == (
        "unreadable",
        "a MatMulNBits of 3 bits is not read here",
    )
    assert not error.is_fault
