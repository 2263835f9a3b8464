"""Opens sessions of ONNX Runtime on one execution provider, or says why it does not start.

ONNX Runtime goes on without a provider that it cannot start: here that is an error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, PhiconvError, StageError

_NOT_LOADED = re.compile(r"^Failed to load (?:.*[/\\])?([^/\\\s]+?):", re.MULTILINE)
# as CudaCall in ONNX Runtime's cuda_call.cc writes them, for CUDA and its libraries
_CUDA_FAILURE = re.compile(r"\b(?:CUDA|CUBLAS|CUDNN|CURAND|CUFFT) failure -?\d+: [^;]*[^;\s]")
# as ONNX Runtime's dml_provider_factory.cc raises them: by itself, and for what Windows returned
_DML_FAILURE = re.compile(
    r"dml_provider_factory\.cc(?::\d+ \S+|.*\btid\(\w+\)) *(?P<reason>\S.*)", re.DOTALL
)


def open_session(
    model: str | bytes, where: str, provider: str, threads: int, entries: Mapping[str, str]
) -> Any:
    """An `onnxruntime.InferenceSession` whose first provider is `provider`.

    Args:
        model: The model's file, or the model itself.
        where: What an error names as its place.
        provider: Execution provider, by ONNX Runtime's name; the CPU's stands in for nodes that
            it leaves out.
        threads: Intra-op threads.
        entries: Entries of the session's configuration.

    Raises:
        EnvironmentLacksError: ONNX Runtime is missing, lacks the provider, or cannot start it.
        StageError: The model cannot be loaded.
    """
    ort = import_onnxruntime()
    if provider not in ort.get_available_providers():
        raise EnvironmentLacksError(
            f"the installed onnxruntime {ort.__version__} has no {provider}, "
            f"only {', '.join(ort.get_available_providers())}",
            where=where,
            remedy="install exactly one of onnxruntime, onnxruntime-gpu, onnxruntime-directml",
        )
    missing = _preload(ort) if provider == machine.CUDA else ""
    options = _options(ort, provider, threads, entries)
    providers = list(dict.fromkeys((provider, machine.CPU)))
    try:
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except runtime_errors() as error:
        reason = _failure_of(provider, str(error))
        if reason is not None:
            raise _not_started(ort, provider, reason, where) from error
        raise StageError(f"ONNX Runtime cannot load the model: {error}", where=where) from error
    if session.get_providers()[0] != provider:
        raise _not_started(ort, provider, missing and f"not found: {missing}", where)
    return session


def start_problem(provider: str) -> str | None:
    """Why a provider does not run a model of one node here; None where it does."""
    from onnx import TensorProto, helper

    from phiconv.runtimes.placement import RECORD, placed_nodes, stray_nodes

    one = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1]) for name in ("a", "b")
    }
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "a"], ["b"], "product")], "one", [one["a"]], [one["b"]]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    failures: tuple[type[Exception], ...] = (*runtime_errors(), EnvironmentLacksError, StageError)
    try:
        session = open_session(model.SerializeToString(), "a test", provider, 1, {RECORD: "1"})
        session.run(None, {"a": [[1.0]]})
    except failures as error:
        return error.message if isinstance(error, PhiconvError) else str(error)
    return ", ".join(stray_nodes(placed_nodes(session), provider)) or None


def import_onnxruntime() -> Any:
    """The module, or an error that says how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacksError(
            f"onnxruntime cannot be imported: {error}", remedy='pip install "phiconv[cpu]"'
        ) from error
    return onnxruntime


def runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: classes of its own, derived from Exception, and builtin ones."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (value for value in vars(state).values() if isinstance(value, type))
    return (*(value for value in own if issubclass(value, Exception)), RuntimeError, ValueError)


def _options(ort: Any, provider: str, threads: int, entries: Mapping[str, str]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if provider == machine.DML:
        options.enable_mem_pattern = False  # DirectML's own requirement
    return options


def _preload(ort: Any) -> str:
    """Loads CUDA's libraries from NVIDIA's Python packages; names those that are nowhere.

    ONNX Runtime prints these, where a command's output may be read by a program.
    """
    heard = io.StringIO()
    with redirect_stdout(heard):
        ort.preload_dlls()
    missing = dict.fromkeys(_NOT_LOADED.findall(heard.getvalue()))
    return ", ".join(name for name in missing if not _load_from_nvidia(name))


def _load_from_nvidia(name: str) -> bool:
    """Loads a library from NVIDIA's packages wherever they are installed.

    ONNX Runtime looks for them beside itself alone, but they may lie elsewhere, as in a virtual
    environment on top of a system's PyTorch.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    for file in (file for folder in folders or () for file in Path(folder).rglob(name)):
        with suppress(OSError):
            ctypes.CDLL(str(file))
            return True
    return False


def _failure_of(provider: str, message: str) -> str | None:
    """Why the provider did not start, as an error's message tells it; None if it tells another."""
    if provider == machine.CUDA and (found := _CUDA_FAILURE.search(message)):
        return found[0]
    if provider == machine.DML and (found := _DML_FAILURE.search(message)):
        return " ".join(found["reason"].split())
    return None


def _not_started(ort: Any, provider: str, reason: str, where: str) -> EnvironmentLacksError:
    remedy = "check the driver and the provider's libraries (phiconv doctor)"
    if provider == machine.CUDA:
        remedy = (
            f"it wants a driver for CUDA {getattr(ort, 'cuda_version', '') or '13'} and the "
            'libraries of that CUDA and of cuDNN 9: pip install "phiconv[cuda]" brings these'
        )
    if provider == machine.DML:
        remedy = "it wants a GPU for DirectX 12 with its driver, on Windows 10 or newer"
    return EnvironmentLacksError(
        f"{provider} is installed but did not start" + (f": {reason}" if reason else ""),
        where=where,
        remedy=remedy,
    )
