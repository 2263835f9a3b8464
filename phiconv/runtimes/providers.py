"""ONNX Runtime execution providers by their short names, and what happens without one.

Nothing here imports onnxruntime: a plan must show what is missing in a fraction of a second. The
exact check, that a session really runs on the provider, is made when the session is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phiconv import machine
from phiconv.errors import EnvironmentLacksError

Provider = Literal["cpu", "cuda", "dml"]
WhenMissing = Literal["require", "fallback-cpu", "skip"]

CPU = machine.CPU
PROVIDERS: dict[Provider, str] = {"cpu": machine.CPU, "cuda": machine.CUDA, "dml": machine.DML}
INSTALL: dict[Provider, str] = {
    "cpu": 'pip install "phiconv[cpu]"',
    "cuda": 'on a machine with an NVIDIA GPU and its driver: pip install "phiconv[cuda]"',
    "dml": 'on Windows with a DirectX 12 GPU: pip install "phiconv[dml]"',
}
REMEDIES: dict[Provider, str] = {
    "cpu": INSTALL["cpu"],
    "cuda": f"{INSTALL['cuda']}; or set when_missing: fallback-cpu or skip",
    "dml": f"{INSTALL['dml']}; or set when_missing: fallback-cpu or skip",
}


@dataclass(frozen=True)
class ProviderChoice:
    """Which execution provider a validation runs on, both by ONNX Runtime's own names.

    `provider` is None when the target is missing and the recipe says to skip.
    """

    target: str
    provider: str | None


DEQUANTIZED = "dequantized weights in PyTorch"
"""What stands in for llama.cpp where it is not installed: it measures weights, not the runtime."""


def choose_llama_cpp(when_missing: WhenMissing) -> ProviderChoice:
    """Decides what a GGUF artifact is measured with; `fallback-cpu` means its weights in PyTorch.

    Raises:
        EnvironmentLacksError: llama.cpp is missing and required.
    """
    if machine.llama_cpp_binding() is not None:
        return ProviderChoice(machine.LLAMA_CPP, machine.LLAMA_CPP)
    if when_missing == "require":
        from phiconv.runtimes.llama_cpp_library import open_library

        open_library()  # says what is missing
    standing_in = DEQUANTIZED if when_missing == "fallback-cpu" else None
    return ProviderChoice(machine.LLAMA_CPP, standing_in)


def choose(provider: Provider, when_missing: WhenMissing) -> ProviderChoice:
    """Decides where a validation runs.

    Args:
        provider: The provider the recipe asks for.
        when_missing: What the recipe says happens without it: `require` is an error,
            `fallback-cpu` runs the same graph on the CPU provider, `skip` runs nothing.

    Raises:
        EnvironmentLacksError: The provider is missing and required; or the CPU provider is
            missing and would have to stand in.
    """
    target = PROVIDERS[provider]
    present = machine.providers()
    if target in present:
        return ProviderChoice(target, target)
    if when_missing == "skip":
        return ProviderChoice(target, None)
    if when_missing == "require" or CPU not in present:
        lacking: Provider = provider if when_missing == "require" else "cpu"
        raise EnvironmentLacksError(
            f"{PROVIDERS[lacking]} is not present on this machine",
            where="provider",
            remedy=REMEDIES[lacking],
        )
    return ProviderChoice(target, CPU)
