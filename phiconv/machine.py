"""What this machine has: execution providers, packages, processor, memory.

Everything here is found without importing ONNX Runtime or torch, so that a plan stays fast.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
from functools import cache
from pathlib import Path

from phiconv import dxgi

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
DML = "DmlExecutionProvider"

_PROC = Path("/proc")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")

LLAMA_CPP = "llama.cpp"
LLAMA_CPP_BINDINGS = {"xllamacpp": "2026.10.11549", "llama-cpp-python": "0.3.36"}
"""Bindings that carry llama.cpp, the preferred first, each with the one version whose structures
`phiconv.runtimes.llama_cpp_library` describes."""

_FLAVOURS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml"),
    "onnxruntime-genai": (
        "onnxruntime-genai",
        "onnxruntime-genai-cuda",
        "onnxruntime-genai-directml",
    ),
}


def distribution(name: str) -> tuple[str, str] | None:
    """The installed distribution that is `name` or a flavour of it, and its version."""
    for candidate in _FLAVOURS.get(name, (name,)):
        try:
            return candidate, importlib.metadata.version(candidate)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def version(name: str) -> str | None:
    """The installed version of a distribution, whichever its flavour; None if there is none."""
    found = distribution(name)
    return found[1] if found else None


@cache
def providers() -> tuple[str, ...]:
    """The execution providers that can work here: installed, and with a device to run on."""
    folder = _package_folder("onnxruntime")
    if folder is None:
        return ()
    names = {file.name for file in (folder / "capi").iterdir()}
    found = []
    if any("onnxruntime_providers_cuda" in name for name in names) and cuda_devices() > 0:
        found.append(CUDA)
    if "DirectML.dll" in names and dxgi.gpus() != ():
        found.append(DML)
    return (*found, CPU)


@cache
def cuda_devices() -> int:
    """How many CUDA devices the installed driver offers; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def llama_cpp_binding() -> tuple[str, str] | None:
    """Name and version of the installed llama.cpp binding whose structures phiconv knows."""
    for name, wanted in LLAMA_CPP_BINDINGS.items():
        found = distribution(name)
        # on Windows xllamacpp exports none of llama.cpp's functions
        usable = name != "xllamacpp" or sys.platform != "win32"
        if found is not None and found[1] == wanted and usable:
            return found
    return None


def has_module(name: str) -> bool:
    """Whether a top-level module can be imported (it is not)."""
    return importlib.util.find_spec(name) is not None


def memory_bytes() -> int:
    """Physical memory, or what this process may have where that is less.

    A control group (of a container, a batch system, a systemd service) or any that it lies in may
    set a limit, and so may `ulimit -v` and `ulimit -d`.
    """
    import psutil

    total = int(psutil.virtual_memory().total)
    return min([total, *_control_group_limits(), *_own_limits()])


def _control_group_limits() -> list[int]:
    """Bytes that the control group, and those it lies in, may have: version 2, else version 1."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            top, name = _CONTROL_GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = _CONTROL_GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be the host's; the top is the container's own group then.
        own = top / path.lstrip("/")
        folders = [own, *own.parents] if ".." not in own.parts else [top]
        for folder in folders[: folders.index(top) + 1]:
            try:
                text = (folder / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            found += [int(text)] if text.isdigit() else []
    return found


def _own_limits() -> list[int]:
    """Bytes of address space and of data that the process may have."""
    if sys.platform == "win32":
        return []
    import resource

    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]


def threads() -> int:
    """The processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> dict[str, str]:
    """The machine in words, for reports: operating system, Python, processor, cores, memory."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": processor(),
        "cores": str(threads()),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
    }


def processor() -> str:
    """The processor's name."""
    for line in _cpu_info():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def processor_features() -> tuple[str, ...]:
    """Of the instruction sets that quantized kernels use, those that Linux reports here."""
    wanted = (
        "avx2",
        "f16c",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
    )
    arm = ("asimd", "asimddp", "i8mm", "bf16", "sve")
    for line in _cpu_info():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return tuple(name for name in (*wanted, *arm) if name in flags)
    return ()


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent
