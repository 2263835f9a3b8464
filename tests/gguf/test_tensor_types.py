from __future__ import annotations

from typing import get_args

import pytest

from phiconv.gguf.file_types import FILE_TYPES, FileTypeName, TypeName
from phiconv.gguf.tensor_types import OUTPUT, TOKEN_EMBEDDING, TypeChoice, assign_types, fitting
from phiconv.kernels.ggml import TYPES


def columns(layers: int, *, tied: bool = False, width: int = 3072) -> dict[str, int]:
    names = [TOKEN_EMBEDDING] if tied else [OUTPUT, TOKEN_EMBEDDING]
    names += [
        f"blk.{layer}.{name}.weight"
        for layer in range(layers)
        for name in ("attn_output", "attn_qkv", "ffn_down", "ffn_up")
    ]
    return dict.fromkeys(names, width)


def chosen(
    layers: int, file_type: FileTypeName, *, tied: bool = False, **choice: object
) -> dict[str, str]:
    assigned = assign_types(
        columns(layers, tied=tied),
        layers,
        TypeChoice(file_type, **choice),  # type: ignore[arg-type]
    )
    return {name: assignment.type for name, assignment in assigned.items()}


def test_every_file_type_is_one_of_llama_cpps() -> None:
    assert set(FILE_TYPES) == set(get_args(FileTypeName))
    assert set(get_args(TypeName)) == set(TYPES)
    assert FILE_TYPES["Q4_K_M"].number == 15  # what the official Phi-3 file says
    for file_type in FILE_TYPES.values():
        _, block_size, block_bytes = TYPES[file_type.type]
        assert file_type.bits == 8 * block_bytes / block_size


def test_q4_k_m_of_phi_3_mini() -> None:
    types = chosen(32, "Q4_K_M")
    more = [i for i in range(32) if i < 4 or i >= 28 or (i - 4) % 3 == 2]
    for layer in range(32):
        expected = "Q6_K" if layer in more else "Q4_K"
        assert types[f"blk.{layer}.attn_qkv.weight"] == expected
        assert types[f"blk.{layer}.ffn_down.weight"] == expected
        assert types[f"blk.{layer}.ffn_up.weight"] == "Q4_K"
        assert types[f"blk.{layer}.attn_output.weight"] == "Q4_K"
    assert types[OUTPUT] == "Q6_K"
    assert types[TOKEN_EMBEDDING] == "Q4_K"


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
def test_plain_files_have_one_type(file_type: FileTypeName) -> None:
    assert set(chosen(8, file_type).values()) == {file_type}


def test_a_tied_embedding_has_the_type_of_a_head() -> None:
    assert chosen(8, "Q4_K_M", tied=True)[TOKEN_EMBEDDING] == "Q6_K"
    assert chosen(8, "Q4_0", tied=True)[TOKEN_EMBEDDING] == "Q6_K"
    assert chosen(8, "Q4_0", tied=True, output="Q8_0")[TOKEN_EMBEDDING] == "Q8_0"
    assert chosen(8, "Q4_0", tied=True, token_embedding="F16")[TOKEN_EMBEDDING] == "F16"


def test_an_importance_matrix_changes_the_first_layers_of_q4_0() -> None:
    types = chosen(16, "Q4_0", has_importance=True)
    found = [types[f"blk.{layer}.ffn_down.weight"] for layer in range(16)]
    assert found == ["Q4_1"] * 2 + ["Q4_0"] * 14
    assert "Q4_1" not in chosen(16, "Q4_0").values()


def test_an_importance_matrix_changes_the_first_layers_of_q5_0() -> None:
    types = chosen(16, "Q5_0", has_importance=True)
    found = [types[f"blk.{layer}.ffn_down.weight"] for layer in range(16)]
    assert found == ["Q5_1"] * 2 + ["Q5_0"] * 14
    assert "Q5_1" not in chosen(16, "Q5_0").values()


def test_q4_k_s_has_more_bits_in_its_first_layers() -> None:
    types = chosen(16, "Q4_K_S")
    qkv = [types[f"blk.{layer}.attn_qkv.weight"] for layer in range(16)]
    down = [types[f"blk.{layer}.ffn_down.weight"] for layer in range(16)]
    assert qkv == ["Q5_K"] * 4 + ["Q4_K"] * 12
    assert down == ["Q5_K"] * 2 + ["Q4_K"] * 14


def test_own_types_also_in_a_file_of_floats() -> None:
    types = chosen(2, "F16", override=lambda name: "Q8_0" if "ffn" in name else None)
    assert types["blk.1.ffn_up.weight"] == "Q8_0"
    assert types["blk.1.attn_qkv.weight"] == "F16"


@pytest.mark.parametrize(
    ("wanted", "width", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q4_K", 96, "Q5_0"),
        ("Q5_K", 96, "Q5_1"),
        ("Q6_K", 96, "Q8_0"),
        ("Q6_K", 100, "F16"),
        ("Q4_0", 96, "Q4_0"),
        ("Q4_0", 100, "F16"),
        ("BF16", 100, "BF16"),
    ],
)
def test_rows_that_are_no_whole_blocks(wanted: TypeName, width: int, expected: str) -> None:
    assert fitting(wanted, width) == expected
