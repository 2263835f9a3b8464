"""What ONNX Runtime's kernels do not do although opset and types fit, as read in its sources.

Each limit names the file and function it was read in, of microsoft/onnxruntime at the commit that
the kernel table records. What was not found there is no limit here: a node without a finding may
still fail when it runs.
"""

from __future__ import annotations

from phiconv.machine import CUDA, DML
from phiconv.runtimes.kernel_limits.attention import ATTENTION_LIMITS
from phiconv.runtimes.kernel_limits.limit import (
    MICROSOFT,
    Effect,
    Limit,
    OperatorNode,
    one_of,
    without_output,
)
from phiconv.runtimes.kernel_limits.quantized import QUANTIZED_LIMITS

__all__ = ["LIMITS", "Effect", "Limit", "OperatorNode"]

# All other types are DML_TENSOR_DATA_TYPE_UNKNOWN.
_DML_TYPES = frozenset(
    {"bool", "double", "float", "float16"}
    | {"int4", "int8", "int16", "int32", "int64"}
    | {"uint4", "uint8", "uint16", "uint32", "uint64"}
)


def _unknown_to_dml(node: OperatorNode) -> str | None:
    types = sorted({kind for kind in (*node.inputs, *node.outputs) if kind} - _DML_TYPES)
    return f"DirectML has no {', '.join(types)}" if types else None


def _to_string(node: OperatorNode) -> str | None:
    return "it casts to string" if "string" in node.outputs else None


_DML = "core/providers/dml/DmlExecutionProvider/src/"
_DML_TYPE_CHECK = _DML + "ExecutionProvider.cpp: DoesNodeContainSupportedDataTypes"
_NORM = _DML + "Operators/DmlOperatorLayerNormalization.cpp: QueryLayerNormalization"
_SKIP = _DML + "Operators/DmlOperatorSkipLayerNormalization.cpp: QuerySkipLayerNormalization"
_SCATTER = _DML + "Operators/DmlOperatorScatter.cpp: QueryScatter"
_CUDA = "core/providers/cuda/cuda_execution_provider.cc: "
_NORMS = ("LayerNormalization", "SimplifiedLayerNormalization")
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_SCATTERS = ("ScatterElements", "ScatterND")

LIMITS: tuple[Limit, ...] = (
    *QUANTIZED_LIMITS,
    *ATTENTION_LIMITS,
    Limit((DML,), "*", (), "declined", _DML_TYPE_CHECK, _unknown_to_dml),
    Limit((DML,), "ai.onnx", _NORMS, "declined", _NORM, without_output(1, "mean or inv_std_var")),
    Limit((DML,), "ai.onnx", _NORMS, "declined", _NORM, without_output(2, "inv_std_var")),
    Limit((DML,), MICROSOFT, _SKIPS, "declined", _SKIP, without_output(1, "mean")),
    Limit((DML,), MICROSOFT, _SKIPS, "declined", _SKIP, without_output(2, "inv_std_var")),
    Limit(
        (DML,),
        "ai.onnx",
        _SCATTERS,
        "declined",
        _SCATTER,
        one_of("reduction", "none", default="none"),
    ),
    Limit((CUDA,), "ai.onnx", ("Cast",), "declined", _CUDA + "CastNeedFallbackToCPU", _to_string),
    Limit(
        (CUDA,),
        "ai.onnx",
        ("ArgMax", "ArgMin"),
        "declined",
        _CUDA + "ArgMaxOrArgMinNeedFallbackToCPU",
        one_of("select_last_index", 0, default=0),
    ),
)
