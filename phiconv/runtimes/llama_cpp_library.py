"""llama.cpp's C library, as the Python packages that carry it install it.

Its structures are passed by value and change between releases, so a package is used in the one
version whose layout is written down here, and the defaults that the library fills in are compared
with those of that release before anything else is asked of it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections import deque
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from phiconv import machine
from phiconv.errors import EnvironmentLacksError

# On Windows xllamacpp exports none of llama.cpp's functions.
_BINDING = "llama-cpp-python" if sys.platform == "win32" else "xllamacpp"
REMEDY = (
    f"pip install {_BINDING}=={machine.LLAMA_CPP_BINDINGS[_BINDING]}, or set when_missing: "
    "fallback-cpu to measure the dequantized weights in PyTorch instead"
)

FLASH_ATTENTION_OFF = 0
TYPE_F32 = 0
VOCABULARY_SENTENCEPIECE = 1

_WARNING, _ERROR, _CONTINUED = 3, 4, 5
_LINES_KEPT = 40
_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class Batch(Structure):
    """`llama_batch`."""

    _fields_: ClassVar[Any] = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


class ModelParams(Structure):
    """`llama_model_params`."""

    _fields_: ClassVar[Any] = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


def _context_fields(*, has_moe_cache: bool) -> list[tuple[str, Any]]:
    """The members of `llama_context_params`; the two releases differ in one."""
    integers = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")
    enums = ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type", "flash_attn_type")
    floats = (
        "rope_freq_base",
        "rope_freq_scale",
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
    )
    flags = ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")
    return [
        *((name, c_uint32) for name in (*integers, "n_outputs_max_per_seq")),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        *((name, c_int) for name in enums),
        *((name, c_float) for name in floats),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        *([("moe_cache_size", c_size_t)] if has_moe_cache else []),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in flags),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class _ContextParams11549(Structure):
    _fields_: ClassVar[Any] = _context_fields(has_moe_cache=True)


class _ContextParamsPython0336(Structure):
    _fields_: ClassVar[Any] = _context_fields(has_moe_cache=False)


_CONTEXT_PARAMS: dict[str, type[Structure]] = {
    "xllamacpp": _ContextParams11549,
    "llama-cpp-python": _ContextParamsPython0336,
}
_FOLDERS = {"xllamacpp": "xllamacpp", "llama-cpp-python": "llama_cpp"}
_PATTERNS = {
    "xllamacpp": ("*.so", "*.dylib"),
    "llama-cpp-python": ("lib/libllama.so", "lib/libllama.dylib", "lib/llama.dll"),
}

# What both releases fill in by default: a structure that is laid out otherwise shows here.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "main_gpu": 0, "vocab_only": False, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_outputs_max_per_seq": 1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "defrag_thold": -1.0,
    "type_k": 1,
    "type_v": 1,
    "offload_kqv": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_version": (c_char_p, ()),
    "llama_print_system_info": (c_char_p, ()),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_model_chat_template": (c_char_p, (c_void_p, c_char_p)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_type": (c_int, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "llama_tokenize": (
        c_int32,
        (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool),
    ),
    "llama_token_to_piece": (c_int32, (c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool)),
    "llama_chat_apply_template": (
        c_int32,
        (c_char_p, c_void_p, c_size_t, c_bool, c_char_p, c_int32),
    ),
}


@dataclass(frozen=True)
class Library:
    """llama.cpp, opened and checked.

    Attributes:
        binding: Name and version of the package that carries it.
        calls: Its functions, argument types declared.
        context_params: `llama_context_params` of its release.
        log: Its last warnings and errors.
    """

    binding: str
    calls: ctypes.CDLL
    context_params: type[Structure]
    log: deque[str]

    @property
    def version(self) -> str:
        """What it calls itself, and the package."""
        return f"{self.calls.llama_version().decode()} ({self.binding})"

    @property
    def system_info(self) -> str:
        """The instruction sets it was built for."""
        return str(self.calls.llama_print_system_info().decode()).strip(" |")

    def last_words(self) -> str:
        """What it said last, for an error message."""
        return "; ".join(line.strip() for line in list(self.log)[-3:] if line.strip())


def open_library() -> Library:
    """Opens the installed llama.cpp.

    Raises:
        EnvironmentLacksError: There is none, or none in the version that is known here.
    """
    found = machine.llama_cpp_binding()
    if found is None:
        raise EnvironmentLacksError(_why_missing(), where="llama.cpp", remedy=REMEDY)
    return _opened(*found)


@cache
def _opened(name: str, version: str) -> Library:
    try:
        calls = ctypes.CDLL(str(_library_file(name)))
        for function, (result, arguments) in _FUNCTIONS.items():
            getattr(calls, function).restype = result
            getattr(calls, function).argtypes = arguments
        context_params = _CONTEXT_PARAMS[name]
        calls.llama_model_default_params.restype = ModelParams
        calls.llama_context_default_params.restype = context_params
        calls.llama_model_load_from_file.restype = c_void_p
        calls.llama_model_load_from_file.argtypes = (c_char_p, ModelParams)
        calls.llama_init_from_model.restype = c_void_p
        calls.llama_init_from_model.argtypes = (c_void_p, context_params)
    except (OSError, AttributeError) as error:
        raise EnvironmentLacksError(
            f"{name} {version} cannot be used: {error}", where="llama.cpp", remedy=REMEDY
        ) from error
    _check_layout(calls, f"{name} {version}")
    log = _listen(calls)
    calls.llama_backend_init()
    return Library(f"{name} {version}", calls, context_params, log)


def _why_missing() -> str:
    for name, wanted in machine.LLAMA_CPP_BINDINGS.items():
        found = machine.distribution(name)
        if found is not None and found[1] != wanted:
            return (
                f"{name} {found[1]} is installed, but only the structures of {name} {wanted} are "
                "known"
            )
        if found is not None:
            return f"{name} exports none of llama.cpp's functions on this platform"
    return "no package that carries llama.cpp is installed"


def _library_file(name: str) -> Path:
    spec = importlib.util.find_spec(_FOLDERS[name])
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    files = [f for folder in folders for pattern in _PATTERNS[name] for f in folder.glob(pattern)]
    if not files:
        raise OSError(f"there is no library in {name}")
    return files[0]


def _check_layout(calls: ctypes.CDLL, binding: str) -> None:
    """Compares what the library fills in by default with what its release is known to."""
    expectations = (
        (calls.llama_model_default_params(), _MODEL_DEFAULTS),
        (calls.llama_context_default_params(), _CONTEXT_DEFAULTS),
    )
    for structure, defaults in expectations:
        for member, expected in defaults.items():
            found = getattr(structure, member)
            if found != expected:
                raise EnvironmentLacksError(
                    f"{binding} lays out {type(structure).__name__} in another way: {member} is "
                    f"{found}, not {expected}",
                    where="llama.cpp",
                    remedy=REMEDY,
                )


def _listen(calls: ctypes.CDLL) -> deque[str]:
    """Keeps the library's warnings and errors instead of printing them."""
    log: deque[str] = deque(maxlen=_LINES_KEPT)
    last = 0

    def note(level: int, text: bytes | None, _: object) -> None:
        nonlocal last
        last = last if level == _CONTINUED else level
        if last in (_WARNING, _ERROR) and text:
            log.append(text.decode(errors="replace"))

    callback = _LogCallback(note)
    calls.llama_log_set(callback, None)
    _KEPT.append(callback)
    return log


# The library holds pointers to these for as long as it is loaded.
_KEPT: list[Any] = []
