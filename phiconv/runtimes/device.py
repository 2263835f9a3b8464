"""Which device is behind an execution provider, for the record of a measurement."""

from __future__ import annotations

import ctypes
import sys

from phiconv import dxgi, machine


def describe_device(provider: str) -> tuple[str, str | None]:
    """Name of the device behind a provider, and its driver's version where there is one."""
    if provider == machine.CUDA:
        return cuda_device() or ("CUDA device", None)
    if provider == machine.CPU:
        return machine.processor(), None
    if provider == machine.DML and (found := dxgi.gpus()):
        # which of several DirectML took, ONNX Runtime does not tell
        return " or ".join(dict.fromkeys(found)), None
    return provider.removesuffix("ExecutionProvider"), None


def cuda_device() -> tuple[str, str] | None:
    """Name of the first CUDA device, and the driver's version with the CUDA it is for.

    None without a device. The driver's own version is NVML's, which may be missing: then there is
    only the CUDA version.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version, device = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    status = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    status = status or driver.cuDeviceGetName(name, len(name), device)
    status = status or driver.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        return None
    # the driver encodes 12.8 as 12080
    major, minor = version.value // 1000, version.value % 1000 // 10
    cuda, own = f"CUDA {major}.{minor}", _driver_version()
    return name.value.decode(errors="replace"), f"{own} ({cuda})" if own else cuda


def _driver_version() -> str | None:
    """The NVIDIA driver's version, such as 580.159.03."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() != 0:
            return None
        status = library.nvmlSystemGetDriverVersion(text, len(text))
        library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return text.value.decode(errors="replace") if status == 0 else None
