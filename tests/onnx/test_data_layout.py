from __future__ import annotations

from phiconv.onnx.data_layout import MAPPING_ALIGNMENT, lay_out


def test_large_tensors_are_mappable_and_small_ones_packed() -> None:
    regions = lay_out({"a": 10, "b": 3 << 20, "c": 5, "d": 1})
    assert [region.offset for region in regions.values()] == [
        0,
        MAPPING_ALIGNMENT,
        MAPPING_ALIGNMENT + (3 << 20),
        MAPPING_ALIGNMENT + (3 << 20) + 64,
    ]
