"""The graphics adapters of a Windows machine, as DXGI lists them.

Interfaces, structures and constants are those of dxgi.h in the Windows SDK.
"""

from __future__ import annotations

import ctypes
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from typing import Any

_FACTORY = uuid.UUID("770aae78-f26f-4dba-a829-253c83d1b387")
"""IDXGIFactory1."""
# Places in the tables of IDXGIFactory1, IDXGIAdapter1 and IUnknown.
_ENUM_ADAPTERS, _GET_DESCRIPTION, _RELEASE = 12, 10, 2
_SOFTWARE = 2
_MICROSOFT, _BASIC_RENDER_DRIVER = 0x1414, 0x8C


class _Description(ctypes.Structure):
    """DXGI_ADAPTER_DESC1."""

    _fields_ = (
        ("name", ctypes.c_wchar * 128),
        ("vendor", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("subsystem", ctypes.c_uint32),
        ("revision", ctypes.c_uint32),
        ("video_memory", ctypes.c_size_t),
        ("system_memory", ctypes.c_size_t),
        ("shared_memory", ctypes.c_size_t),
        ("luid", ctypes.c_uint32 * 2),
        ("flags", ctypes.c_uint32),
    )


@cache
def gpus() -> tuple[str, ...] | None:
    """Names of the graphics adapters that are hardware; None where DXGI cannot be asked.

    ONNX Runtime's DirectML leaves out the others, with which Windows draws where there is no GPU.
    """
    if sys.platform != "win32":
        return None
    factory = ctypes.c_void_p()
    wanted = ctypes.create_string_buffer(_FACTORY.bytes_le, 16)
    try:
        create = ctypes.WinDLL("dxgi").CreateDXGIFactory1
    except (OSError, AttributeError):
        return None
    if create(wanted, ctypes.byref(factory)) < 0:
        return None
    try:
        found = list(_descriptions(factory))
    finally:
        _method(factory, _RELEASE)(factory)
    return tuple(item.name for item in found if _is_hardware(item.vendor, item.device, item.flags))


def _is_hardware(vendor: int, device: int, flags: int) -> bool:
    return not flags & _SOFTWARE and (vendor, device) != (_MICROSOFT, _BASIC_RENDER_DRIVER)


def _descriptions(factory: ctypes.c_void_p) -> Iterator[_Description]:
    enumerate_adapters = _method(factory, _ENUM_ADAPTERS, ctypes.c_uint, ctypes.c_void_p)
    adapter, index = ctypes.c_void_p(), 0
    while enumerate_adapters(factory, index, ctypes.byref(adapter)) >= 0:
        description = _Description()
        describe = _method(adapter, _GET_DESCRIPTION, ctypes.c_void_p)
        if describe(adapter, ctypes.byref(description)) >= 0:
            yield description
        _method(adapter, _RELEASE)(adapter)
        index += 1


def _method(instance: ctypes.c_void_p, place: int, *parameters: Any) -> Any:
    """A method of a COM object, by its place in the object's table; gives an HRESULT."""
    table = ctypes.cast(instance, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
    prototype: Any = getattr(ctypes, "WINFUNCTYPE")  # noqa: B009 - known on Windows only
    return prototype(ctypes.c_long, ctypes.c_void_p, *parameters)(table[place])
