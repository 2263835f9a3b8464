"""The kinds of GGUF files and the ggml types in them, by llama.cpp's names.

Apart from the rules that use them, so that a plan can name them without loading a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

TypeName: TypeAlias = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"
]
FileTypeName: TypeAlias = Literal[
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
]

FLOAT_TYPES = ("F32", "F16", "BF16")


class FileType(NamedTuple):
    """A kind of file.

    Attributes:
        number: `llama_ftype` of llama.h, the value of `general.file_type`.
        type: The type of the tensors that no rule gives another one.
        bits: Bits of a weight of that type, scales included.
    """

    number: int
    type: TypeName
    bits: float


FILE_TYPES: Mapping[FileTypeName, FileType] = {
    "F32": FileType(0, "F32", 32),
    "F16": FileType(1, "F16", 16),
    "Q4_0": FileType(2, "Q4_0", 4.5),
    "Q4_1": FileType(3, "Q4_1", 5),
    "Q8_0": FileType(7, "Q8_0", 8.5),
    "Q5_0": FileType(8, "Q5_0", 5.5),
    "Q5_1": FileType(9, "Q5_1", 6),
    "Q4_K_S": FileType(14, "Q4_K", 4.5),
    "Q4_K_M": FileType(15, "Q4_K", 4.5),
    "Q5_K_S": FileType(16, "Q5_K", 5.5),
    "Q5_K_M": FileType(17, "Q5_K", 5.5),
    "Q6_K": FileType(18, "Q6_K", 6.5625),
    "BF16": FileType(32, "BF16", 16),
}
