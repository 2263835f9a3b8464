from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
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


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/build/job\n", {"build/job/memory.max": "max", "build/memory.max": "2000"}, 2000),
        ("0::/build/job\n", {"build/job/memory.max": "1000", "memory.max": "2000"}, 1000),
        ("0::/../host\n", {"memory.max": "3000"}, 3000),
        ("4:cpu,memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "4000"}, 4000),
        ("3:cpu:/job\n0::/\n", {}, None),
        ("nonsense\n", {}, None),
    ],
)
def test_memory_is_what_the_control_group_leaves(
    groups: str,
    files: dict[str, str],
    limit: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", tmp_path / "groups")
    total = psutil.virtual_memory().total
    assert machine.memory_bytes() == min([limit or total, *machine._own_limits()])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
def test_memory_is_what_ulimit_leaves() -> None:
    code = "from phiconv import machine; print(machine.memory_bytes())"
    limited = f"ulimit -v 900000 && exec '{sys.executable}' -c '{code}'"
    done = subprocess.run(["/bin/sh", "-c", limited], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 900_000 * 1024


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
