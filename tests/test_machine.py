from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from phiconv import machine
from phiconv.doctor import examine
from phiconv.resources import Meter
from phiconv.workspace import Workspace


def providers_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str, devices: int = 0
) -> tuple[str, ...]:
    (folder / "capi").mkdir()
    for name in files:
        (folder / "capi" / name).write_bytes(b"")
    monkeypatch.setattr(machine, "_package_folder", lambda name: folder)
    monkeypatch.setattr(machine, "cuda_devices", lambda: devices)
    return machine.providers.__wrapped__()


def test_the_installed_runtime_has_the_cpu_provider() -> None:
    import onnxruntime

    assert machine.CPU in machine.providers()
    assert set(machine.providers()) <= set(onnxruntime.get_available_providers())


def test_cuda_needs_a_library_and_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = "libonnxruntime_providers_cuda.so"
    assert providers_with(tmp_path, monkeypatch, library) == (machine.CPU,)
    (tmp_path / "other").mkdir()
    found = providers_with(tmp_path / "other", monkeypatch, library, devices=1)
    assert found == (machine.CUDA, machine.CPU)


def test_directml_is_in_its_own_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert providers_with(tmp_path, monkeypatch, "DirectML.dll") == (machine.DML, machine.CPU)


def test_nothing_is_there_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_package_folder", lambda name: None)
    assert machine.providers.__wrapped__() == ()


def test_a_flavour_counts_as_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "onnxruntime-gpu":
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    assert machine.distribution("onnxruntime") == ("onnxruntime-gpu", "1.31.1")
    assert machine.version("onnxruntime") == "1.31.1"
    assert machine.version("torch") is None


def test_modules_are_found_without_being_imported() -> None:
    assert machine.has_module("onnxruntime_genai")
    assert not machine.has_module("no_such_module_anywhere")


def test_the_machine_is_described() -> None:
    described = machine.describe()
    assert set(described) == {"system", "python", "processor", "cores", "memory"}
    assert machine.memory_bytes() > 2**28
    assert machine.threads() >= 1


def test_a_meter_measures_time_processor_and_peak_memory() -> None:
    with Meter() as meter:
        block = bytearray(b"x") * (64 << 20)
        while meter.usage().cpu_s < 0.05:
            sum(range(10_000))
        time.sleep(0.11)  # two samples
        peak = meter.peak_rss_bytes
        del block
        usage = meter.usage()
    assert peak >= 64 << 20
    assert usage.peak_rss_bytes >= peak
    assert usage.wall_s >= usage.cpu_s / machine.threads() > 0
    assert not [thread for thread in threading.enumerate() if thread.name == "phiconv-memory"]


def test_doctor_finds_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> tuple[str, str] | None:
        return None if name == "numba" else (name, "1.0")

    def import_module(name: str) -> object:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(machine, "distribution", distribution)
    monkeypatch.setattr("importlib.import_module", import_module)
    findings = {
        (finding.topic, finding.name): finding for finding in examine(Workspace(tmp_path / "home"))
    }
    assert findings["packages", "numba"].ok is False
    assert findings["packages", "torch"].ok is True
    assert findings["reference", "torch"].value == "cannot be imported: no torch"
    assert findings["providers", "onnxruntime"].ok is False
    assert findings["workspace", "artifacts"].value == "0, 0 B"
