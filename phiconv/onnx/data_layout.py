"""Where tensors lie in an ONNX model's external-data file."""

from __future__ import annotations

from collections.abc import Mapping

from phiconv.data_file import Region

# Large tensors start where every platform can map them (Windows' allocation granularity); small
# ones only need their elements aligned.
MAPPABLE_BYTES = 1 << 20
MAPPING_ALIGNMENT = 64 << 10
SMALL_ALIGNMENT = 64


def lay_out(lengths: Mapping[str, int]) -> dict[str, Region]:
    """Place tensors one after the other, aligned, in the order given."""
    regions: dict[str, Region] = {}
    end = 0
    for name, length in lengths.items():
        alignment = MAPPING_ALIGNMENT if length >= MAPPABLE_BYTES else SMALL_ALIGNMENT
        offset = -(-end // alignment) * alignment
        regions[name] = Region(offset, length)
        end = offset + length
    return regions
