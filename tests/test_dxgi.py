"""Graphics adapters: DXGI itself on Windows, a COM object of the test's own elsewhere."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

from phiconv import dxgi, machine
from phiconv.runtimes.device import describe_device

CALL: Any = getattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE)
NOT_FOUND = 0x887A0002 - (1 << 32)
ADAPTERS = (
    ("Imaginary RX 7900", 0x1002, 0x744C, 0),
    ("Microsoft Basic Render Driver", 0x1414, 0x8C, 0),
    ("Imaginary WARP", 0x1002, 1, 2),
    ("Imaginary Arc", 0x8086, 0x56A0, 0),
)


class ComObject:
    """An object whose table has methods at some places."""

    def __init__(self, **methods: Any) -> None:
        self.released = 0
        functions = {int(place[1:]): method for place, method in methods.items()}
        functions[2] = CALL(ctypes.c_long, ctypes.c_void_p)(self._release)
        places = (functions.get(place) for place in range(16))
        self._functions = functions
        self._table = (ctypes.c_void_p * 16)(
            *(ctypes.cast(it, ctypes.c_void_p) if it else None for it in places)
        )
        self._instance = ctypes.c_void_p(ctypes.addressof(self._table))
        self.pointer = ctypes.c_void_p(ctypes.addressof(self._instance))

    def _release(self, this: int) -> int:
        self.released += 1
        return 0


def adapter(name: str, vendor: int, device: int, flags: int) -> ComObject:
    def describe(this: int, target: int) -> int:
        found = dxgi._Description.from_address(target)
        found.name, found.vendor, found.device, found.flags = name, vendor, device, flags
        return 0

    return ComObject(_10=CALL(ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)(describe))


def test_adapters_are_listed_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "WINFUNCTYPE", CALL, raising=False)
    adapters = [adapter(*row) for row in ADAPTERS]

    def enumerate_adapters(this: int, index: int, target: int) -> int:
        if index == len(adapters):
            return NOT_FOUND
        ctypes.c_void_p.from_address(target).value = adapters[index].pointer.value
        return 0

    method = CALL(ctypes.c_long, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
    factory = ComObject(_12=method(enumerate_adapters))
    found = list(dxgi._descriptions(factory.pointer))
    assert [(item.name, item.vendor, item.device, item.flags) for item in found] == list(ADAPTERS)
    assert [item.released for item in adapters] == [1] * len(ADAPTERS)
    hardware = [row[0] for row in ADAPTERS if dxgi._is_hardware(*row[1:])]
    assert hardware == ["Imaginary RX 7900", "Imaginary Arc"]


def test_this_machine_can_be_asked_on_windows_only() -> None:
    found = dxgi.gpus()
    if sys.platform != "win32":
        assert found is None
    else:
        assert ctypes.sizeof(dxgi._Description) == 312
        assert found is None or all(found)


@pytest.mark.parametrize(
    ("gpus", "present"), [(("Imaginary Arc",), True), ((), False), (None, True)]
)
def test_directml_needs_a_gpu_where_that_can_be_known(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: tuple[str, ...] | None,
    present: bool,
) -> None:
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "DirectML.dll").touch()
    monkeypatch.setattr(machine, "_package_folder", lambda name: tmp_path)
    monkeypatch.setattr(dxgi, "gpus", lambda: gpus)
    assert (machine.DML in machine.providers.__wrapped__()) is present


def test_the_device_of_directml_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dxgi, "gpus", lambda: ("Arc", "RX 7900", "Arc"))
    assert describe_device(machine.DML) == ("Arc or RX 7900", None)
    monkeypatch.setattr(dxgi, "gpus", lambda: None)
    assert describe_device(machine.DML) == ("Dml", None)
