"""Rewrites GGUF files with gguf's own reader and writer, to plant faults in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

TEXT, FLOAT = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
WHOLE, FLAG = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.BOOL
_KINDS = {str: TEXT, float: FLOAT, int: WHOLE, bool: FLAG}


def rewrite(
    source: Path,
    out: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Writes `source` to `out` with other scalars and tensors; None leaves one out.

    A tensor is given as its bytes, uint8 `[rows, bytes of a row]`, or as float32.
    """
    changed, replaced = dict(metadata or {}), dict(tensors or {})
    reader = gguf.GGUFReader(source)
    architecture = changed.get("general.architecture")
    if architecture is None:
        architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, value in changed.items():
        if value is not None and name != "general.architecture":
            writer.add_key_value(name, value, _KINDS[type(value)])
    for tensor in reader.tensors:
        data = replaced.pop(tensor.name, np.array(tensor.data))
        if data is not None:
            raw = None if data.dtype == np.float32 else tensor.tensor_type
            writer.add_tensor(tensor.name, data, raw_dtype=raw)
    for name, data in replaced.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
