"""Which device is behind an execution provider, for the record of a measurement."""

from __future__ import annotations

import ctypes
import sys

from phiconv import machine


def describe_device(provider: str) -> tuple[str, str | None]:
    """Name of the device behind a provider, and its driver's version where there is one."""
    if provider == machine.CUDA:
        return cuda_device() or ("CUDA device", None)
    if provider == machine.CPU:
        return machine.processor(), None
    return provider.removesuffix("ExecutionProvider"), None


def cuda_device() -> tuple[str, str] | None:
    """Name of the first CUDA device and the driver's CUDA version; None without a device."""
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
    return name.value.decode(errors="replace"), f"CUDA {major}.{minor}"
