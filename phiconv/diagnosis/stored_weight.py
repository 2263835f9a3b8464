"""Weights of an ONNX graph as float32 rows `[N, K]`, however they are stored.

The dequantization is written apart from the one `phiconv.kernels` writes weights with, from the
definitions of ONNX Runtime's operators MatMulNBits and GatherBlockQuantized and of ONNX's
DequantizeLinear, so that a mistake in one does not hide in the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.folder import member
from phiconv.diagnosis.decoder_graph import constant_source
from phiconv.diagnosis.weight_format import Format, StoredWeight
from phiconv.errors import CheckpointError, StageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

_FLOATS = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16", "DOUBLE": "f64"}


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight stored as floats: `values` is `[N, K]`, or `[N]` for a norm."""

    name: str
    format: Format
    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, K]` or `[N]`."""
        return tuple(self.values.shape)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `[start, stop)` as float32."""
        import numpy as np

        return np.ascontiguousarray(self.values[start:stop], dtype=np.float32)


@dataclass(frozen=True, eq=False)
class BlockWeight:
    """A weight stored as integers with a scale a block: `(code - zero_point) * scale`.

    Attributes:
        name: The initializer with the codes.
        format: How it is stored.
        width: K, the weights of a row.
        packed: Codes, uint8 `[N, bytes of a row]`, low bits first.
        scales: `[N, blocks]`.
        zero_points: uint8 `[N, bytes of a row]` packed as the codes are, or floats `[N, blocks]`;
            None where they are `default_zero_point`.
        default_zero_point: The zero point where none is stored.
    """

    name: str
    format: Format
    width: int
    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zero_points: NDArray[Any] | None
    default_zero_point: float

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, K]`."""
        return (len(self.packed), self.width)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `[start, stop)`, dequantized to float32."""
        import numpy as np

        blocks, size = self.scales.shape[1], self.format.block_size
        codes = unpack(self.packed[start:stop], int(self.format.bits))[:, : blocks * size]
        if codes.shape[1] < blocks * size:
            codes = np.pad(codes, ((0, 0), (0, blocks * size - codes.shape[1])))
        values = codes.reshape(-1, blocks, size).astype(np.float32)
        values -= self._zero_points(start, stop, blocks)
        values *= self.scales[start:stop, :, None].astype(np.float32)
        return values.reshape(stop - start, -1)[:, : self.width]

    def _zero_points(self, start: int, stop: int, blocks: int) -> Any:
        import numpy as np

        if self.zero_points is None:
            return np.float32(self.default_zero_point)
        zero = self.zero_points[start:stop]
        if zero.dtype == np.uint8:
            zero = unpack(zero, int(self.format.bits))[:, :blocks]
        return zero[:, :, None].astype(np.float32)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes `[n, 8 / bits * m]` of bytes `[n, m]`, the lowest bits first."""
    import numpy as np

    if bits == 8:
        return packed
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    codes = np.empty((len(packed), packed.shape[1] * per_byte), np.uint8)
    for place in range(per_byte):
        codes[:, place::per_byte] = (packed >> np.uint8(place * bits)) & mask
    return codes


def linear_weight(node: ir.Node) -> StoredWeight:
    """The weight `[N, K]` of a MatMul, FusedMatMul, Gemm or MatMulNBits.

    Raises:
        StageError: It is stored in a way that is not known here.
    """
    if node.op_type == "MatMulNBits":
        return _matmul_nbits(node)
    weight = _evaluate(node.inputs[1], str(node.name))
    transposed = node.op_type in ("FusedMatMul", "Gemm") and "transB" in node.attributes
    if transposed and node.attributes["transB"].as_int():
        return weight
    return _transposed(weight)


def embedding_weight(node: ir.Node) -> StoredWeight:
    """The table `[V, K]` of a Gather or GatherBlockQuantized.

    Raises:
        StageError: It is stored in a way that is not known here.
    """
    if node.op_type == "GatherBlockQuantized":
        return _gather_block_quantized(node)
    return _evaluate(node.inputs[0], str(node.name))


def norm_weight(value: ir.Value) -> StoredWeight:
    """The weight `[N]` of a norm."""
    return _evaluate(value, str(value.name))


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The data of an initializer or Constant as NumPy has it, None where there is none."""
    if value is None:
        return None
    tensor = value.const_value
    node = value.producer()
    if tensor is None and node is not None and node.op_type == "Constant":
        attribute = node.attributes.get("value")
        tensor = None if attribute is None else attribute.as_tensor()
    if tensor is None:
        return None
    try:
        return _external(tensor) if _is_external(tensor) else tensor.numpy()
    except (OSError, ValueError, CheckpointError) as error:
        raise StageError(
            f"the data of {value.name} cannot be read: {error}",
            remedy="keep the external data file beside the model",
        ) from error


def _is_external(tensor: ir.TensorProtocol) -> bool:
    """Whether its data is whole elements of a file beside the model."""
    import onnx_ir as ir

    return isinstance(tensor, ir.ExternalTensor) and tensor.dtype.bitwidth >= 8


def _external(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """Data of a tensor in a file, read afresh by every call.

    Not onnx_ir's own way: its tensors are not to be shared by threads, keep the whole file mapped,
    and refuse a file with a second name, as those of the Hugging Face cache have.
    """
    import numpy as np
    import onnx_ir as ir

    assert isinstance(tensor, ir.ExternalTensor)
    name = str(tensor.location).replace("\\", "/")
    path = member(Path(tensor.base_dir or "."), name)
    shape = tensor.shape.numpy()
    count = math.prod(shape)
    dtype = tensor.dtype.numpy().newbyteorder("<")
    data = np.fromfile(path, dtype, count, offset=tensor.offset or 0)
    if len(data) < count:
        raise ValueError(f"{name} ends within it")
    return data.reshape(shape)


def _matmul_nbits(node: ir.Node) -> BlockWeight:
    name = str(node.name)
    bits, block_size = _integer(node, "bits", 4), _integer(node, "block_size", 32)
    if bits not in (2, 4, 8) or _integer(node, "weight_prepacked", 0) or _data(node, 4) is not None:
        raise StageError(
            f"a MatMulNBits of {bits} bits, prepacked or with g_idx, is not read here", where=name
        )
    packed, scales = _data(node, 1), _data(node, 2)
    if packed is None or scales is None:
        raise StageError("a MatMulNBits without constant weight and scales", where=name)
    n, k = _integer(node, "N", 0), _integer(node, "K", 0)
    return _block_weight(
        name=_name(node, 1),
        width=k,
        packed=packed.reshape(n, -1),
        scales=scales.reshape(n, -1),
        zero_points=_data(node, 3),
        bits=bits,
        block_size=block_size,
    )


def _gather_block_quantized(node: ir.Node) -> BlockWeight:
    name = str(node.name)
    codes, scales = _reshaped(node.inputs[0]), _data(node, 2)
    if codes is None or scales is None:
        raise StageError("a GatherBlockQuantized without constant data and scales", where=name)
    axis = _integer(node, "quantize_axis", 1)
    if axis not in (1, -1) or _integer(node, "gather_axis", 0) != 0:
        raise StageError(f"a GatherBlockQuantized along axis {axis} is not read here", where=name)
    bits = _integer(node, "bits", 4)
    data, default = _codes(codes, bits)
    zero_points = _data(node, 3)
    if zero_points is not None:
        zero_points, _ = _codes(zero_points, bits)
    rows = len(data)
    return _block_weight(
        name=_name(node, 0),
        width=data.shape[1] * 8 // bits,
        packed=data,
        scales=scales.reshape(rows, -1),
        zero_points=zero_points,
        bits=bits,
        block_size=_integer(node, "block_size", 128),
        default_zero_point=default,
    )


def _block_weight(
    *,
    name: str,
    width: int,
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zero_points: NDArray[Any] | None,
    bits: int,
    block_size: int,
    default_zero_point: float | None = None,
) -> BlockWeight:
    middle = float(1 << (bits - 1))
    if zero_points is not None:
        zero_points = zero_points.reshape(len(packed), -1)
    scale_dtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[scales.dtype.name]
    return BlockWeight(
        name,
        Format(bits, "int", block_size, zero_points is None, scale_dtype),
        width,
        packed,
        scales,
        zero_points,
        middle if default_zero_point is None else default_zero_point,
    )


def _codes(values: NDArray[Any], bits: int) -> tuple[NDArray[np.uint8], float]:
    """Codes packed as bytes, and the code that stands for zero where no zero point is stored.

    A signed type is shifted to unsigned, its zero along with it.
    """
    import numpy as np

    dtype = values.dtype.name
    if dtype == "uint8":
        return values, float(1 << (bits - 1))
    offset = {"int4": 8, "uint4": 0, "int8": 128}[dtype]
    codes = (values.astype(np.int16) + offset).astype(np.uint8)
    if dtype == "int8":
        return codes, float(offset)
    pairs = codes.reshape(len(codes), -1, 2)
    return pairs[:, :, 0] | (pairs[:, :, 1] << np.uint8(4)), float(offset)


def _evaluate(value: ir.Value | None, where: str) -> DenseWeight:
    """Follows a weight back through layout changes to what is stored."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type in ("Cast", "Identity"):
        return _evaluate(node.inputs[0], where)
    if node is not None and node.op_type == "Transpose":
        return _transposed(_evaluate(node.inputs[0], where))
    if node is not None and node.op_type == "DequantizeLinear":
        return _dequantize_linear(node, where)
    values = constant(value)
    if value is None or values is None:
        raise StageError("a weight that is no constant", where=where)
    name = "" if value.dtype is None else value.dtype.name
    if name not in _FLOATS:
        raise StageError(f"a weight of type {name} without scales", where=where)
    dtype = _FLOATS[name]
    return DenseWeight(str(value.name), Format(values.dtype.itemsize * 8, dtype), values)


def _dequantize_linear(node: ir.Node, where: str) -> DenseWeight:
    """Block-wise DequantizeLinear (ONNX 21) of a 2-D weight, evaluated at once.

    Its blocks may run along either axis, and the types are those of whole tensors, which cannot be
    read in part.
    """
    import numpy as np

    values, scales, zero = _data(node, 0), _data(node, 1), _data(node, 2)
    if values is None or scales is None or values.ndim != 2:
        raise StageError("a DequantizeLinear that is not of a constant 2-D weight", where=where)
    axis = _integer(node, "axis", 1) % 2
    block_size = _integer(node, "block_size", 0)
    if scales.ndim != 2 or not block_size:
        raise StageError("a DequantizeLinear that is not block-wise", where=where)

    def spread(block_values: NDArray[Any]) -> NDArray[np.float32]:
        wide = np.repeat(block_values.astype(np.float32), block_size, axis=axis)
        return wide[: values.shape[0], : values.shape[1]]

    result = values.astype(np.float32)
    if zero is not None:
        result -= spread(zero)
    result *= spread(scales)
    bits = 4 if values.dtype.name in ("int4", "uint4") else 8
    symmetric = zero is None or not np.any(zero)
    scale_dtype = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[scales.dtype.name]
    return DenseWeight(
        _name(node, 0), Format(bits, "int", block_size, symmetric, scale_dtype), result
    )


def _transposed(weight: DenseWeight) -> DenseWeight:
    return DenseWeight(weight.name, weight.format, weight.values.T)


def _reshaped(value: ir.Value | None) -> NDArray[Any] | None:
    """The data of a constant, reshaped where a Reshape to a constant shape follows it."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Reshape":
        return constant(value)
    values, shape = constant(node.inputs[0]), constant(node.inputs[1])
    return None if values is None or shape is None else values.reshape(shape.tolist())


def _name(node: ir.Node, index: int) -> str:
    source = constant_source(node.inputs[index])
    return str(node.name if source is None else source.name)


def _data(node: ir.Node, index: int) -> NDArray[Any] | None:
    return constant(node.inputs[index]) if index < len(node.inputs) else None


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
