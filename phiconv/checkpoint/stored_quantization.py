"""How a checkpoint says that its weights are quantized already: `quantization_config`.

Read are what AutoAWQ writes (`quant_method: awq`, version gemm) and what AutoGPTQ and GPTQModel
write (`quant_method: gptq`, formats gptq and gptq_v2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phiconv.checkpoint.config_keys import ConfigKeys

_ORIGINAL = "use the checkpoint in its original bf16, fp16 or fp32 form"
_AWQ_KEYS = ("version", "format", "checkpoint_format")
_GPTQ_KEYS = ("checkpoint_format", "format")


@dataclass(frozen=True)
class StoredQuantization:
    """The format of a quantized checkpoint.

    Attributes:
        method: Who packs the integers how.
        bits: Bits of a weight.
        group_size: Input features that share a scale; -1 for all of them.
        symmetric: Whether every zero point is the middle code.
        zero_offset: What is to be added to a stored zero point.
        varies: Whether single weights may have other bits or another group_size.
    """

    method: Literal["awq", "gptq"]
    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int = 0
    varies: bool = False


def read_quantization(keys: ConfigKeys) -> StoredQuantization | None:
    """Reads `quantization_config`; None where there is none.

    What is not supported is refused in `keys`.
    """
    section = keys.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method", "")
    if method == "awq":
        return _read_awq(section)
    if method == "gptq":
        return _read_gptq(section)
    section.refuse(
        "quant_method",
        f"is {method!r}: of quantized checkpoints those of AutoAWQ (awq) and GPTQ (gptq) are read",
        _ORIGINAL,
    )
    return None


def _read_awq(section: ConfigKeys) -> StoredQuantization:
    layout = _first_text(section, _AWQ_KEYS, "gemm")
    if layout != "gemm":
        section.refuse(
            "version", f"is {layout!r}: of AWQ's layouts gemm is read, which AutoAWQ writes"
        )
    bits = section.integer("bits", section.integer("w_bit", 4))
    if bits != 4:
        section.refuse("bits", f"is {bits}: AWQ's layout gemm is for 4 bits")
    return StoredQuantization("awq", 4, _group_size(section), symmetric=False)


def _read_gptq(section: ConfigKeys) -> StoredQuantization:
    layout = _first_text(section, _GPTQ_KEYS, "gptq")
    if layout not in ("gptq", "gptq_v2") or section.flag("is_marlin_format", False):
        section.refuse(
            "checkpoint_format", f"is {layout!r}: of GPTQ's layouts gptq and gptq_v2 are read"
        )
    bits = section.integer("bits")
    if section.present("bits") and bits not in (4, 8):
        section.refuse("bits", f"is {bits}: MatMulNBits weights have 4 or 8", _ORIGINAL)
    return StoredQuantization(
        "gptq",
        bits,
        _group_size(section),
        symmetric=section.flag("sym", True),
        zero_offset=0 if layout == "gptq_v2" else 1,
        varies=section.present("dynamic"),
    )


def _group_size(section: ConfigKeys) -> int:
    size = section.optional_integer("group_size", minimum=-1)
    if size is None:
        size = section.integer("q_group_size", 128, minimum=-1)
    if size == 0:
        section.refuse("group_size", "must be -1 or at least 1, not 0")
    return size


def _first_text(section: ConfigKeys, names: tuple[str, ...], default: str) -> str:
    for name in names:
        if section.present(name):
            return section.text(name, default).lower()
    return default
