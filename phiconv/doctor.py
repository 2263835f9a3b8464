"""What this machine can run, for `phiconv doctor` and bug reports."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from phiconv import __version__, machine
from phiconv.errors import EnvironmentLacksError
from phiconv.units import size_text
from phiconv.workspace import Workspace
from phiconv.workspace.disk import free_bytes

_PACKAGES = (
    "onnxruntime",
    "onnxruntime-genai",
    "onnx",
    "onnx-ir",
    "gguf",
    "olive-ai",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "numba",
    "ml_dtypes",
    "pydantic",
)
_OPTIONAL = ("olive-ai",)
_PROVIDERS = (machine.CPU, machine.CUDA, machine.DML)


@dataclass(frozen=True)
class Finding:
    """One line of the report: `ok` is None where there is nothing to judge."""

    topic: str
    name: str
    value: str
    ok: bool | None = None


def examine(workspace: Workspace) -> list[Finding]:
    """Looks at the machine; imports the runtimes, so it takes a few seconds."""
    return [
        *_machine(),
        *_packages(),
        *_providers(),
        *_llama_cpp(),
        *_torch(),
        *_workspace(workspace),
    ]


def _machine() -> list[Finding]:
    found = [Finding("machine", name, value) for name, value in machine.describe().items()]
    features = machine.processor_features()
    if features:
        found.append(Finding("machine", "processor features", ", ".join(features)))
    return found


def _packages() -> list[Finding]:
    found = [Finding("packages", "phiconv", __version__)]
    for name in _PACKAGES:
        installed = machine.distribution(name)
        label, value = installed or (name, "not installed")
        absent = None if name in _OPTIONAL else False
        found.append(Finding("packages", label, value, ok=True if installed else absent))
    return found


def _providers() -> list[Finding]:
    """Providers of the installed ONNX Runtime, by its own word and by what is on the machine."""
    runtime, problem = _imported("onnxruntime")
    if runtime is None:
        return [Finding("providers", "onnxruntime", problem, ok=False)]
    offered = tuple(runtime.get_available_providers())
    usable = machine.providers()
    found = []
    for name in dict.fromkeys((*_PROVIDERS, *offered)):
        if name in usable and name in offered:
            found.append(_started(name))
        elif name in offered and name not in _PROVIDERS:
            found.append(Finding("providers", name, "in ONNX Runtime, not used by phiconv"))
        elif name in offered:
            found.append(Finding("providers", name, "in ONNX Runtime, no device found"))
        else:
            found.append(Finding("providers", name, "not in the installed ONNX Runtime"))
    genai, problem = _imported("onnxruntime_genai")
    if genai is None:
        return [*found, Finding("providers", "onnxruntime_genai", problem, ok=False)]
    devices = [
        name
        for name, ask in (("CUDA", "is_cuda_available"), ("DirectML", "is_dml_available"))
        if getattr(genai, ask, lambda: False)()
    ]
    value = "works" + (f", built for {', '.join(devices)}" if devices else ", CPU")
    return [*found, Finding("providers", "onnxruntime_genai", value, ok=True)]


def _started(name: str) -> Finding:
    """Whether a provider with a device to run on does run; and on which, if that is a GPU."""
    from phiconv.runtimes.device import describe_device
    from phiconv.runtimes.session import start_problem

    problem = start_problem(name)
    if problem is not None:
        return Finding("providers", name, problem, ok=False)
    device, driver = describe_device(name)
    on = "" if name == machine.CPU else f", {device}" + (f", driver {driver}" if driver else "")
    return Finding("providers", name, f"usable{on}", ok=True)


def _llama_cpp() -> list[Finding]:
    """The llama.cpp that GGUF files are run on, or what stands in for it."""
    from phiconv.runtimes.llama_cpp_library import open_library

    try:
        return [Finding("providers", machine.LLAMA_CPP, open_library().version, ok=True)]
    except EnvironmentLacksError as error:
        return [Finding("providers", machine.LLAMA_CPP, error.message, ok=False)]


def _torch() -> list[Finding]:
    torch, problem = _imported("torch")
    if torch is None:
        return [Finding("reference", "torch", problem, ok=False)]
    if torch.cuda.is_available():
        return [Finding("reference", "torch", f"cuda: {torch.cuda.get_device_name()}", ok=True)]
    return [Finding("reference", "torch", f"cpu, {torch.get_num_threads()} threads", ok=True)]


def _imported(name: str) -> tuple[Any, str]:
    """The module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError) as error:
        return None, f"cannot be imported: {error}"


def _workspace(workspace: Workspace) -> list[Finding]:
    entries = workspace.entries()
    size = size_text(sum(entry.stored_bytes for entry in entries))
    home = workspace.home
    return [
        Finding("workspace", "folder", str(home)),
        Finding("workspace", "artifacts", f"{len(entries)}, {size}"),
        Finding("workspace", "disk", f"{size_text(free_bytes(home))} free"),
    ]
