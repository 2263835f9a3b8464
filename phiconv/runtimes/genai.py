"""Runs an ONNX artifact in ONNX Runtime GenAI: the KV cache, positions and genai_config.json.

The same model.onnx gives the same prefill logits as a plain session; what this adds is what users
run: decoding on the KV cache, and greedy generation as genai_config.json sets it up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.report.results import Provenance
from phiconv.runtimes.device import describe_device
from phiconv.runtimes.onnxruntime import Session, all_positions
from phiconv.runtimes.providers import CPU, ProviderChoice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.runtimes import ArtifactFolder

# How GenAI's error begins where CUDA cannot be used.
_NO_CUDA = "Cuda interface not available"
# GenAI's name of a provider, and of the function that says whether it was built for it.
_GENAI_PROVIDERS = {
    machine.CUDA: ("cuda", "is_cuda_available"),
    machine.DML: ("dml", "is_dml_available"),
}


class GenAIModel:
    """An artifact with its genai_config.json; see `phiconv.runtimes.GeneratingRuntime`.

    The config's own provider is replaced by the chosen one, so a CUDA or DirectML artifact can be
    run on the CPU.

    Args:
        folder: The artifact.
        choice: Where it is to run, and what the recipe wanted; `provider` must not be None.
        threads: Intra-op threads.

    Raises:
        EnvironmentLacksError: onnxruntime-genai is missing or has no such provider.
        StageError: The artifact has no genai_config.json, or cannot be loaded.
    """

    def __init__(self, folder: ArtifactFolder, choice: ProviderChoice, threads: int):
        if choice.provider is None:
            raise ValueError("no provider to open a model on")
        self._where = str(folder.path)
        self._choice = choice
        self._provider = choice.provider
        self._threads = threads
        if not (folder.path / "genai_config.json").is_file():
            raise StageError(
                "the artifact has no genai_config.json",
                where=self._where,
                remedy="validate it with runtime: onnxruntime",
            )
        self._og = _import_genai()
        _check_built_for(self._og, self._provider, self._where)
        self._placement, self._strays = self._placed(folder)
        self._model = self._load()
        if (str(self._model.device_type) == "CPU") != (self._provider == CPU):
            raise EnvironmentLacksError(
                f"{self._provider} is installed but did not start: the model is on "
                f"{self._model.device_type}",
                where=self._where,
            )

    def logits(self, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yields the prefill logits of each window, see `phiconv.runtimes.Runtime.logits`."""
        for index, window in enumerate(windows):
            generator = self._generator(len(window))
            self._append(generator, window)
            where = f"{self._where}, window {index}"
            yield all_positions(generator.get_output("logits"), len(window), where)

    def decode_logits(self, window: NDArray[np.int64], prefill: int) -> NDArray[np.float32]:
        """Logits of later positions by decoding, see `phiconv.runtimes.GeneratingRuntime`."""
        import numpy as np

        generator = self._generator(len(window))
        self._append(generator, window[:prefill])
        rows = []
        for position in range(prefill, len(window)):
            self._append(generator, window[position : position + 1])
            rows.append(all_positions(generator.get_output("logits"), 1, self._where)[0].copy())
        return np.stack(rows)

    def generate(self, prompt: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
        """Greedy continuation, see `phiconv.runtimes.GeneratingRuntime`."""
        import numpy as np

        generator = self._generator(len(prompt) + tokens)
        self._append(generator, prompt)
        generated: list[int] = []
        while len(generated) < tokens and not generator.is_done():
            try:
                generator.generate_next_token()
            except RuntimeError as error:
                raise self._failure(error) from error
            generated.append(int(generator.get_next_tokens()[0]))
        return np.array(generated, dtype=np.int64)

    def provenance(self) -> Provenance:
        """Says which provider the model is on, and where a plain session puts its nodes."""
        name, driver = describe_device(self._provider)
        return Provenance(
            runtime="onnxruntime-genai",
            runtime_version=str(self._og.__version__),
            target_provider=self._choice.target,
            provider=self._provider,
            device=name,
            driver=driver,
            threads=self._threads,
            options={"do_sample": "false"},
            placement=self._placement,
            strays=self._strays,
        )

    def _placed(
        self, folder: ArtifactFolder
    ) -> tuple[Mapping[str, Mapping[str, int]], tuple[str, ...]]:
        """Placement and strays of a session of the same model, closed again.

        GenAI keeps no record of single nodes. On the CPU, the only provider then, there is none
        to ask for.
        """
        if self._provider == CPU:
            return {}, ()
        found = Session(folder, self._choice, self._threads).provenance()
        return found.placement, found.strays

    def _load(self) -> Any:
        name, _ = _GENAI_PROVIDERS.get(self._provider, (None, None))
        session_options = {"intra_op_num_threads": self._threads, "log_severity_level": 3}
        overlay = {"model": {"decoder": {"session_options": session_options}}}
        try:
            config = self._og.Config(self._where)
            config.clear_providers()
            if name is not None:
                config.append_provider(name)
            config.overlay(json.dumps(overlay))
            return self._og.Model(config)
        except RuntimeError as error:
            if _NO_CUDA in str(error):
                raise EnvironmentLacksError(
                    f"{self._provider} is installed but GenAI did not start it: {error}",
                    where=self._where,
                    remedy="check the driver (phiconv doctor)",
                ) from error
            raise self._failure(error) from error

    def _generator(self, max_length: int) -> Any:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max_length, do_sample=False, batch_size=1)
        try:
            return self._og.Generator(self._model, parameters)
        except RuntimeError as error:
            raise self._failure(error) from error

    def _append(self, generator: Any, ids: NDArray[np.int64]) -> None:
        import numpy as np

        try:
            generator.append_tokens(ids[None].astype(np.int32))
        except RuntimeError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StageError:
        return StageError(f"ONNX Runtime GenAI failed: {error}", where=self._where)


def _check_built_for(genai: Any, provider: str, where: str) -> None:
    """The builds of GenAI are separate distributions, so it may lack what ONNX Runtime has.

    Raises:
        EnvironmentLacksError: This one does.
    """
    name, question = _GENAI_PROVIDERS.get(provider, (None, ""))
    if name is None or getattr(genai, question)():
        return
    flavour = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}[name]
    raise EnvironmentLacksError(
        f"the installed onnxruntime-genai {genai.__version__} was not built for {provider}",
        where=where,
        remedy=f"install {flavour} instead of it, or validate with runtime: onnxruntime",
    )


def _import_genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise EnvironmentLacksError(
            f"onnxruntime-genai cannot be imported: {error}", remedy='pip install "phiconv[cpu]"'
        ) from error
    return onnxruntime_genai
