"""Sessions on providers that are missing, or there and do not start."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phiconv import machine
from phiconv.doctor import examine
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.runtimes import device, session
from phiconv.runtimes.session import import_onnxruntime, open_session, start_problem
from phiconv.workspace import Workspace

# What onnxruntime-gpu 1.31.1 said with a driver too old for CUDA 13, its paths and types shortened.
OLD_DRIVER = (
    "cuda_call.cc:154 onnxruntime::CudaCall(ERRTYPE, const char*, int) [with ERRTYPE = cudaError] "
    "cuda_call.cc:146 onnxruntime::CudaCall(ERRTYPE, const char*, int) CUDA failure 36: API call "
    "is not supported in the installed CUDA driver ; GPU=-1 ; hostname=vm ; "
    "file=cuda_execution_provider.cc ; line=355 ; expr=cudaSetDevice(info_.device_id); \n\n"
)
NO_CUBLAS = OLD_DRIVER[: OLD_DRIVER.index("CUDA failure")] + (
    "CUBLAS failure 1: the library was not initialized ; GPU=0 ; hostname=vm ; "
    "file=cuda_execution_provider.cc ; line=245 ; expr=cublasCreate(&cublas_handle_); \n\n"
)
# What it printed without CUDA's libraries, and with one of the wrong kind.
NOT_FOUND = """\
Failed to load libcublasLt.so.13: libcublasLt.so.13: cannot open shared object file
Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file
Failed to load /site-packages/nvidia/cu13/lib/libcurand.so.10: invalid ELF header
Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.
"""


# What onnxruntime-directml 1.24.4 said without DXCore; and as it words what Windows returns.
NO_DXCORE = (
    r"E:\_work\1\s\onnxruntime\core\providers\dml\dml_provider_factory.cc:338 "
    "onnxruntime::DMLProviderFactoryCreator::CreateFromDeviceOptions DXCore is not available on "
    "this platform. This is expected on older versions of Windows.\n"
)
NO_DEVICE = (
    r"E:\_work\1\s\onnxruntime\core\providers\dml\dml_provider_factory.cc(520)"
    r"\onnxruntime_pybind11_state.pyd!00007FF8A3D1B2C4: (caller: 00007FF8A3D1A0F0) "
    "Exception(1) tid(1a2c) 887A0004 The specified device interface or feature level is not "
    "supported on this system.\r\n"
)


class Ort:
    """An onnxruntime on a machine where something is wrong."""

    __version__ = "1.31.1"
    cuda_version = "13.0"
    SessionOptions = staticmethod(lambda: import_onnxruntime().SessionOptions())

    def __init__(self, printed: str = "", failure: str = "", provider: str = machine.CUDA) -> None:
        self._printed, self._failure, self._provider = printed, failure, provider

    def get_available_providers(self) -> list[str]:
        return [self._provider, machine.CPU]

    def preload_dlls(self) -> None:
        sys.stdout.write(self._printed)

    def InferenceSession(self, *_: Any, providers: list[str], **__: Any) -> Any:  # noqa: N802
        assert providers == [self._provider, machine.CPU]
        if self._failure:
            raise RuntimeError(self._failure)
        return SimpleNamespace(get_providers=lambda: [machine.CPU])


def not_started(ort: Ort, monkeypatch: pytest.MonkeyPatch) -> EnvironmentLacksError:
    monkeypatch.setattr(session, "import_onnxruntime", lambda: ort)
    with pytest.raises(EnvironmentLacksError, match="is installed but did not start") as caught:
        open_session("model.onnx", "model.onnx", machine.CUDA, 1, {})
    assert caught.value.exit_code == 5
    assert "wants a driver for CUDA 13.0" in str(caught.value)
    return caught.value


def test_a_session_that_goes_on_without_the_provider_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = not_started(Ort(), monkeypatch)
    assert error.message == "CUDAExecutionProvider is installed but did not start"


def test_libraries_that_are_missing_are_named_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = not_started(Ort(NOT_FOUND), monkeypatch)
    assert error.message.endswith(
        "did not start: not found: libcublasLt.so.13, libcublas.so.13, libcurand.so.10"
    )
    assert capsys.readouterr().out == ""


def test_libraries_of_nvidias_packages_are_found_wherever_these_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the order in which ONNX Runtime wants them: each needs those before."""
    names = ("libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10")
    for name in names[:2]:
        file = tmp_path / "nvidia" / "cu13" / "lib" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    loaded = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(session.ctypes, "CDLL", loaded.append)
    error = not_started(Ort(NOT_FOUND), monkeypatch)
    assert error.message.endswith("did not start: not found: libcurand.so.10")
    assert [Path(file).name for file in loaded] == ["libcublasLt.so.13", "libcublas.so.13"]
    assert all(str(tmp_path) in file for file in loaded)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (OLD_DRIVER, "CUDA failure 36: API call is not supported in the installed CUDA driver"),
        (NO_CUBLAS, "CUBLAS failure 1: the library was not initialized"),
    ],
)
def test_a_failure_of_cuda_is_the_environments_fault(
    monkeypatch: pytest.MonkeyPatch, failure: str, reason: str
) -> None:
    error = not_started(Ort(failure=failure), monkeypatch)
    assert error.message.endswith(f"did not start: {reason}")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            NO_DXCORE,
            "DXCore is not available on this platform. This is expected on older versions of "
            "Windows.",
        ),
        (
            NO_DEVICE,
            "887A0004 The specified device interface or feature level is not supported on this "
            "system.",
        ),
    ],
)
def test_a_failure_of_directml_is_the_environments_fault(
    monkeypatch: pytest.MonkeyPatch, failure: str, reason: str
) -> None:
    ort = Ort(failure=failure, provider=machine.DML)
    monkeypatch.setattr(session, "import_onnxruntime", lambda: ort)
    with pytest.raises(EnvironmentLacksError, match="GPU for DirectX 12") as caught:
        open_session("model.onnx", "model.onnx", machine.DML, 1, {})
    assert caught.value.exit_code == 5
    assert caught.value.message.endswith(f"is installed but did not start: {reason}")


@pytest.mark.parametrize("provider", [machine.CUDA, machine.DML])
def test_another_failure_is_the_models(monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    ort = Ort(failure="no opset 99", provider=provider)
    monkeypatch.setattr(session, "import_onnxruntime", lambda: ort)
    with pytest.raises(StageError, match="cannot load the model: no opset 99"):
        open_session("model.onnx", "model.onnx", provider, 1, {})


def test_a_provider_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "import_onnxruntime", Ort)
    with pytest.raises(EnvironmentLacksError, match="has no DmlExecutionProvider"):
        open_session("model.onnx", "model.onnx", machine.DML, 1, {})


def test_the_cpu_starts() -> None:
    assert start_problem(machine.CPU) is None


def test_doctor_says_why_a_provider_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    ort = Ort(NOT_FOUND)
    monkeypatch.setattr(session, "import_onnxruntime", lambda: ort)
    monkeypatch.setattr(machine, "providers", lambda: (machine.CUDA,))
    monkeypatch.setattr(
        import_onnxruntime(), "get_available_providers", ort.get_available_providers
    )
    found = {finding.name: finding for finding in examine(Workspace(tmp_path))}
    assert found[machine.CUDA].ok is False
    assert "not found: libcublasLt.so.13" in found[machine.CUDA].value


class Library:
    """A driver's library, whose functions fill in what they are given."""

    def __init__(self, version: bytes | None) -> None:
        self._version = version

    def cuInit(self, _: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, _: Any, __: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, _: int, __: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA Imaginary 4000"
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13010
        return 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0 if self._version else 1

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, _: int) -> int:  # noqa: N802
        text.value = self._version
        return 0


@pytest.mark.parametrize(
    ("version", "driver"), [(b"580.65.06", "580.65.06 (CUDA 13.1)"), (None, "CUDA 13.1")]
)
def test_a_cuda_device_is_described_with_its_driver(
    monkeypatch: pytest.MonkeyPatch, version: bytes | None, driver: str
) -> None:
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: Library(version))
    assert device.describe_device(machine.CUDA) == ("NVIDIA Imaginary 4000", driver)


def test_without_a_driver_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"no {name}")

    monkeypatch.setattr(device.ctypes, "CDLL", absent)
    assert device.cuda_device() is None
    assert device.describe_device(machine.CUDA) == ("CUDA device", None)
