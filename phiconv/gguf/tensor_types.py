"""Which ggml type each matrix of a Phi-3 file gets: llama.cpp's own rules, by file type.

The rules are those of `llama_tensor_get_type` and `tensor_type_fallback` (llama-quant.cpp, build
11549) for the tensors that a Phi-3 has, so a file is laid out as `llama-quantize` lays it out.
Vectors are no matter of choice: norms and rotary factors are F32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from phiconv.gguf.file_types import FILE_TYPES, FLOAT_TYPES, FileTypeName, TypeName
from phiconv.kernels.ggml import TYPES

TOKEN_EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"

# What a 256-wide type becomes where rows are no whole number of its blocks, but of 32.
_NARROWER: Mapping[TypeName, TypeName] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


class Assignment(NamedTuple):
    """The type of one tensor, and the type it would have if its rows were wide enough for it."""

    type: TypeName
    wanted: TypeName


@dataclass(frozen=True)
class TypeChoice:
    """What a recipe decides about types.

    Attributes:
        file_type: The kind of file.
        token_embedding: The embedding's type; None follows the rules.
        output: The head's type, with tied embeddings the embedding's; None follows the rules.
        override: The type that the recipe gives a tensor by its name, or None.
        has_importance: Whether an importance matrix is used, which changes some rules.
    """

    file_type: FileTypeName
    token_embedding: TypeName | None = None
    output: TypeName | None = None
    override: Callable[[str], TypeName | None] = lambda _: None
    has_importance: bool = False


def assign_types(
    columns: Mapping[str, int], layers: int, choice: TypeChoice
) -> dict[str, Assignment]:
    """Chooses the type of every matrix.

    Args:
        columns: Width of a row by GGUF name, of every matrix in the order of its layers.
        layers: Number of decoder layers.
        choice: What the recipe decides.

    Returns:
        The assignment of each name.
    """
    rules = _Rules(choice, layers, tied=OUTPUT not in columns)
    assigned = {}
    for name, width in columns.items():
        wanted = rules.wanted(name)
        assigned[name] = Assignment(fitting(wanted, width), wanted)
    return assigned


def fitting(wanted: TypeName, columns: int) -> TypeName:
    """`wanted`, or what llama.cpp takes where rows of `columns` values are no whole blocks of it.

    Rows that are not even a multiple of 32 are stored as F16.
    """
    for candidate in (wanted, _NARROWER.get(wanted)):
        if candidate is not None and columns % TYPES[candidate].block_size == 0:
            return candidate
    return "F16"


class _Rules:
    """llama.cpp's choice, tensor by tensor.

    The rules by depth count the tensors they were asked about, as llama.cpp does: a tensor with a
    type of its own from the recipe is not asked about, and does not count.
    """

    def __init__(self, choice: TypeChoice, layers: int, *, tied: bool):
        self._choice = choice
        self._default = FILE_TYPES[choice.file_type].type
        self._layers = layers
        self._tied = tied
        self._attention = 0
        self._ffn_down = 0

    def wanted(self, name: str) -> TypeName:
        choice = self._choice
        if name == TOKEN_EMBEDDING and choice.token_embedding is not None:
            return choice.token_embedding
        if name == OUTPUT and choice.output is not None:
            return choice.output
        own = choice.override(name)
        if own is not None:
            return own
        if name == OUTPUT or (name == TOKEN_EMBEDDING and self._tied):
            return self._head()
        if self._default in FLOAT_TYPES:
            return self._default
        if name.endswith("attn_qkv.weight"):
            self._attention += 1
            return self._qkv(self._attention - 1)
        if name.endswith("ffn_down.weight"):
            self._ffn_down += 1
            return self._down(self._ffn_down - 1)
        return self._default

    def _head(self) -> TypeName:
        if self._choice.output is not None:
            return self._choice.output
        # where rows are no whole blocks of Q6_K, Q8_0 is what it falls back to
        return self._default if self._default in (*FLOAT_TYPES, "Q8_0") else "Q6_K"

    def _qkv(self, index: int) -> TypeName:
        match self._choice.file_type:
            case "Q4_K_M" | "Q5_K_M" if self._is_sensitive(index):
                return "Q6_K"
            case "Q4_K_S" if index < 4:
                return "Q5_K"
        return self._default

    def _down(self, index: int) -> TypeName:
        early = index < self._layers // 8
        match self._choice.file_type:
            case "Q4_K_M" | "Q5_K_M" if self._is_sensitive(index):
                return "Q6_K"
            case "Q4_K_S" if early:
                return "Q5_K"
            case "Q4_0" if early and self._choice.has_importance:
                return "Q4_1"
            case "Q5_0" if early and self._choice.has_importance:
                return "Q5_1"
        return self._default

    def _is_sensitive(self, index: int) -> bool:
        """The first and last eighth of the layers, and every third between (`use_more_bits`)."""
        eighth = self._layers // 8
        return index < eighth or index >= 7 * self._layers // 8 or (index - eighth) % 3 == 2
