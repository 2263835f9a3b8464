"""Limits of attention, rotary embedding and the normalizations fused with a residual."""

from __future__ import annotations

from phiconv.machine import CPU, CUDA, DML
from phiconv.runtimes.kernel_limits.limit import (
    MICROSOFT,
    Effect,
    Limit,
    OperatorNode,
    Problem,
    one_of,
    together,
    unread,
    without_input,
    without_output,
)


def _head_size(node: OperatorNode) -> int | None:
    """Head size of GroupQueryAttention, by its cache or else its query; None if unknown."""
    cached = node.dim(3, -1)
    # a quantized cache may be packed
    if cached is not None and node.type_of(3) == node.type_of(0):
        return cached
    hidden, heads = node.dim(0, -1), node.attribute("num_heads", 0)
    if not node.has_input(1):
        heads += 2 * node.attribute("kv_num_heads", 0)
    return hidden // heads if hidden is not None and heads > 0 else None


def _head_counts(node: OperatorNode) -> str | None:
    heads, kv_heads = node.attribute("num_heads", 0), node.attribute("kv_num_heads", 0)
    if heads > 0 and kv_heads > 0 and heads % kv_heads == 0:
        return None
    return f"num_heads={heads} is not a multiple of kv_num_heads={kv_heads}"


def _uneven_head(node: OperatorNode) -> str | None:
    size = _head_size(node)
    return None if size is None or size % 8 == 0 else f"head size {size} is not a multiple of 8"


def _rotary_caches(node: OperatorNode) -> str | None:
    if not node.has_input(7) or not node.has_input(8):
        return None
    size = _head_size(node)
    if size is not None and size % 16:
        return f"head size {size} is not a multiple of 16, which cos_cache and sin_cache need"
    for width in (node.dim(7, 1), node.dim(8, 1)):
        if width is not None and (width % 8 or (size is not None and width > size // 2)):
            return (
                f"cos_cache or sin_cache has {width} columns, not a multiple of 8 up to half a head"
            )
    return None


def _rotary_without_caches(node: OperatorNode) -> str | None:
    if node.attribute("do_rotary", 0) != 1 or (node.has_input(7) and node.has_input(8)):
        return None
    return "do_rotary=1 without cos_cache and sin_cache"


def _packed(node: OperatorNode) -> str | None:
    if node.has_input(1) and node.has_input(2):
        return None
    return "query, key and value are packed into one input"


def _biased_sink(node: OperatorNode) -> str | None:
    sink = node.has_input(11) or node.attribute("smooth_softmax", 0) == 1
    if node.has_input(10) and sink:
        return "attention_bias together with smooth_softmax or head_sink"
    return None


def _window(node: OperatorNode) -> str | None:
    size = node.attribute("local_window_size", -1)
    if size == -1 or 0 < size < 2**31:
        return None
    return f"local_window_size={size}, neither -1 nor more than 0"


def _rotary_without_heads(node: OperatorNode) -> str | None:
    width = node.attribute("rotary_embedding_dim", 0)
    if width == 0 or node.attribute("num_heads", 0) > 0:
        return None
    return f"rotary_embedding_dim={width} without num_heads"


def _gqa(providers: tuple[str, ...], effect: Effect, source: str, problem: Problem) -> Limit:
    return Limit(providers, MICROSOFT, ("GroupQueryAttention",), effect, source, problem)


def _declined_attention(problem: Problem) -> Limit:
    source = _DML + "DmlOperatorAttention.cpp: QueryAttention"
    return Limit((DML,), MICROSOFT, ("Attention",), "declined", source, problem)


_DML = "core/providers/dml/DmlExecutionProvider/src/Operators/"
_DML_GQA = _DML + "DmlOperatorGroupQueryAttention.cpp: DmlOperatorGroupQueryAttention"
_GQA = "contrib_ops/cpu/bert/group_query_attention_helper.h: "
_CPU_GQA = "contrib_ops/cpu/bert/group_query_attention.cc: GroupQueryAttention::Compute"
_CUDA_GQA = "contrib_ops/cuda/bert/group_query_attention.cc: GroupQueryAttention::"
_ROTARY = {
    CPU: "contrib_ops/cpu/bert/rotary_embedding.cc: RotaryEmbedding::RotaryEmbedding",
    CUDA: "contrib_ops/cpu/bert/rotary_embedding_helper.h: CheckInputs",
    DML: _DML + "DmlOperatorRotaryEmbedding.cpp: DmlOperatorRotaryEmbedding",
}

ATTENTION_LIMITS = (
    _gqa((CPU, CUDA), "refused", _GQA + "CheckInputs", _head_counts),
    _gqa((CPU, CUDA), "refused", _GQA + "Check_Q_K_V, Check_QKV", _uneven_head),
    _gqa((CPU, CUDA), "refused", _GQA + "Check_Q_K_V, Check_QKV", together(1, 2, "key and value")),
    _gqa((CPU, CUDA), "refused", _GQA + "CheckInputs", together(3, 4, "past_key and past_value")),
    _gqa((CPU, CUDA), "refused", _GQA + "CheckInputs", together(7, 8, "cos_cache and sin_cache")),
    _gqa((CPU, CUDA), "refused", _GQA + "CheckRotaryCaches", _rotary_caches),
    _gqa((CPU,), "refused", _CPU_GQA, _rotary_without_caches),
    _gqa((CPU,), "refused", _CPU_GQA, without_input(14, "q_norm_weight")),
    _gqa((CPU,), "refused", _CPU_GQA, without_input(15, "k_norm_weight")),
    _gqa((CUDA,), "refused", _CUDA_GQA + "ComputeInternal", _rotary_without_caches),
    _gqa((CUDA,), "refused", _CUDA_GQA + "ComputeInternal", _biased_sink),
    _gqa((CUDA,), "refused", _CUDA_GQA + "GroupQueryAttention", _window),
    _gqa((CUDA,), "refused", _GQA + "CheckNoQKOutput", without_output(3, "output_qk")),
    _gqa((CUDA,), "refused", _GQA + "CheckNoQKOutput", one_of("qk_output", 0, default=0)),
    # the constructor wants key and value with three dimensions each
    _gqa((DML,), "refused", _DML_GQA, _packed),
    _gqa((DML,), "refused", _DML_GQA, one_of("causal", 1, default=1)),
    _gqa((DML,), "refused", _DML_GQA, without_input(14, "q_norm_weight")),
    _gqa((DML,), "refused", _DML_GQA, without_input(15, "k_norm_weight")),
    # of the rest it reads the caches, seqlens_k, total_sequence_length, the head counts and scale
    _gqa((DML,), "misread", _DML_GQA, unread("do_rotary", 0)),
    _gqa((DML,), "misread", _DML_GQA, unread("local_window_size", -1)),
    _gqa((DML,), "misread", _DML_GQA, unread("softcap", 0.0)),
    _gqa((DML,), "misread", _DML_GQA, unread("smooth_softmax", 0)),
    _gqa((DML,), "misread", _DML_GQA, unread("k_quant_type", "NONE")),
    _gqa((DML,), "misread", _DML_GQA, unread("v_quant_type", "NONE")),
    _gqa((DML,), "misread", _DML_GQA, without_input(10, "attention_bias")),
    _gqa((DML,), "misread", _DML_GQA, without_input(11, "head_sink")),
    *(
        Limit(
            (provider,), MICROSOFT, ("RotaryEmbedding",), "refused", source, _rotary_without_heads
        )
        for provider, source in _ROTARY.items()
    ),
    _declined_attention(without_input(4, "past")),
    _declined_attention(without_input(6, "past_sequence_length")),
    _declined_attention(without_output(1, "present")),
    _declined_attention(one_of("unidirectional", 0, default=0)),
    _declined_attention(one_of("do_rotary", 0, default=0)),
    _declined_attention(one_of("past_present_share_buffer", 0, default=0)),
)
