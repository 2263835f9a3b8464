"""Runs one pass of Microsoft Olive on an ONNX model.

The only module that touches `olive`. A pass is given the model and a folder of its own, and what
it makes is handed back as an `onnx_ir.Model`; where its tensors go is phiconv's decision. Olive
logs problems and goes on, returns the model it was given when a pass found nothing to do, and
ignores keys of a config that it does not know: all three are errors here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, StageError

if TYPE_CHECKING:
    import onnx_ir as ir

EXTERNAL_DATA_KEYS = (
    "save_as_external_data",
    "all_tensors_to_one_file",
    "external_data_name",
    "size_threshold",
    "convert_attribute",
)
"""Keys of a pass's config that say how the model is stored, which phiconv decides itself."""

_ONNX_PASSES = "olive.passes.onnx."
_DEVICES = {"cpu": ("cpu", machine.CPU), "cuda": ("gpu", machine.CUDA), "dml": ("gpu", machine.DML)}


@dataclass(frozen=True)
class ListedPass:
    """What Olive's package says of a pass, without importing it.

    Attributes:
        takes_onnx: Whether it works on ONNX models; others take PyTorch or vendor models.
        needs_data: Whether it wants a data set.
        distributions: Packages that it needs beyond Olive's own dependencies, as pip names them.
    """

    takes_onnx: bool
    needs_data: bool
    distributions: tuple[str, ...]


def listed_passes() -> dict[str, ListedPass]:
    """The passes of the installed Olive by name; {} where Olive is not installed.

    Read from the list that Olive's package holds, so nothing is imported.
    """
    spec = importlib.util.find_spec("olive")
    if spec is None or spec.origin is None:
        return {}
    text = Path(spec.origin).with_name("olive_config.json").read_text(encoding="utf-8")
    document = json.loads(text)
    extras: Mapping[str, list[str]] = document.get("extra_dependencies", {})
    return {
        name: ListedPass(
            entry["module_path"].startswith(_ONNX_PASSES),
            entry.get("dataset") == "dataset_required",
            tuple(
                distribution
                for dependency in (
                    *entry.get("module_dependencies", ()),
                    *entry.get("extra_dependencies", ()),
                )
                for distribution in extras.get(dependency, [dependency])
            ),
        )
        for name, entry in document["passes"].items()
    }


def run_pass(
    name: str,
    config: Mapping[str, Any],
    model: Path,
    scratch: Path,
    *,
    provider: Literal["cpu", "cuda", "dml"],
    accept_warnings: Sequence[str] = (),
) -> ir.Model:
    """Runs a pass of Olive.

    Args:
        name: The pass, such as ``GraphSurgeries``.
        config: Its configuration, without the keys that say how the model is stored.
        model: The ONNX file; its external data lies beside it.
        scratch: An empty folder for what the pass writes. The tensors of the returned model may
            lie in it or beside `model`.
        provider: What the pass is told to optimize for.
        accept_warnings: Patterns (shell style) of warnings that are no errors.

    Raises:
        EnvironmentLacksError: Olive, or a package that the pass needs, cannot be imported.
        StageError: The configuration is wrong, or the pass failed, said that it left something
            undone, changed nothing, or made something other than one ONNX model.
    """
    import onnx_ir as ir

    where = f"olive: {name}"
    with _quiet() as spoken:
        try:
            made = _run(name, config, model, scratch, provider)
        except ImportError as error:
            raise EnvironmentLacksError(
                f"the pass cannot be imported: {error}",
                where=where,
                remedy='pip install "phiconv[olive]" and what the pass needs beyond it',
            ) from error
        except StageError:
            raise
        # A pass is foreign code that raises whatever it likes.
        except Exception as error:
            raise StageError(
                f"the pass failed: {type(error).__name__}: {error}",
                where=where,
                remedy=spoken.last() or "look the pass up in Olive's documentation",
            ) from error
    refused = spoken.refused(accept_warnings)
    if refused:
        raise StageError(
            f"the pass went on after: {'; '.join(refused)}",
            where=where,
            remedy="change its config so that this does not happen, or name what is harmless in "
            "accept_warnings",
        )
    _unlink(scratch)
    done = ir.load(made)
    if made.resolve() == model.resolve() or _equal(ir.load(model), done):
        raise StageError(
            "the pass left the model as it is: nothing in it matches the config",
            where=where,
            remedy=spoken.last() or "take the stage out, or change its config",
        )
    _load_inline_tensors(done)
    return done


def _unlink(folder: Path) -> None:
    """Makes files of their own of those that a pass linked to its input; ONNX reads no others."""
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_nlink > 1:
            copy = file.with_name(f"{file.name}.copy")
            shutil.copyfile(file, copy)
            copy.replace(file)


def _equal(before: ir.Model, after: ir.Model) -> bool:
    """Whether graph and weights are the same; that Olive ran is no difference."""
    if _structure(before) != _structure(after):
        return False
    weights = before.graph.initializers
    return all(
        _content(weights[name]) == _content(value)
        for name, value in after.graph.initializers.items()
    )


def _content(weight: ir.Value) -> bytes:
    return b"" if weight.const_value is None else weight.const_value.tobytes()


def _structure(model: ir.Model) -> list[bytes]:
    """Everything but the weights' values, as ONNX writes it."""
    import onnx_ir as ir

    graph = model.graph
    weights = [
        f"{name} {value.dtype} {value.shape}".encode()
        for name, value in sorted(graph.initializers.items())
    ]
    kept = {key: text for key, text in model.metadata_props.items() if key != "olive_version"}
    protos: list[Any] = [
        *(ir.serde.serialize_value(value) for value in (*graph.inputs, *graph.outputs)),
        *(ir.serde.serialize_node(node) for node in graph),
    ]
    head = f"{graph.name} {model.opset_imports} {kept}".encode()
    return [head, *(proto.SerializeToString(deterministic=True) for proto in protos), *weights]


def _load_inline_tensors(model: ir.Model) -> None:
    """Reads from the data file what phiconv keeps in the graph."""
    import onnx_ir as ir

    from phiconv.onnx.writer import INLINE_BYTES

    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            outer = graph is model.graph and tensor is not None and tensor.nbytes > INLINE_BYTES
            if isinstance(tensor, ir.ExternalTensor) and not outer:
                (value.const_value,) = ir.external_data.convert_tensors_from_external([tensor])


def _run(name: str, config: Mapping[str, Any], model: Path, scratch: Path, provider: str) -> Path:
    """Runs the pass and returns the file it made, or `model` itself."""
    from olive.hardware import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.package_config import OlivePackageConfig

    kind = OlivePackageConfig.load_default_config().import_pass_module(name)
    accelerator = AcceleratorSpec(*_DEVICES[provider])
    known = kind.default_config(accelerator)
    complete = dict(config)
    if EXTERNAL_DATA_KEYS[0] in known:
        complete |= {"save_as_external_data": True, "all_tensors_to_one_file": True}
    _check_keys(name, config, known)
    parsed = kind.generate_config(accelerator, complete, disable_search=True)
    if not kind.validate_config(parsed, accelerator):
        raise StageError(
            f"the pass does not take this config for the provider {provider}",
            where=f"olive: {name}",
        )
    handler = ONNXModelHandler(model_path=str(model.parent), onnx_file_name=model.name)
    made = kind(accelerator, parsed).run(handler, str(scratch / model.name))
    if not isinstance(made, ONNXModelHandler):
        raise StageError(
            f"the pass makes a {type(made).__name__}, not one ONNX model",
            where=f"olive: {name}",
            remedy="phiconv ships one decoder: run this pass with Olive itself",
        )
    return Path(made.model_path)


def _check_keys(name: str, config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses keys that the pass does not have, and those whose content no cache key could hold."""
    from olive.common.config_utils import ParamCategory

    unknown = sorted(config.keys() - known.keys())
    if unknown:
        raise StageError(
            f"the pass has no config key {', '.join(unknown)}",
            where=f"olive: {name}: config",
            remedy=f"its keys are {', '.join(sorted(known.keys() - set(EXTERNAL_DATA_KEYS)))}",
        )
    outside = (ParamCategory.PATH, ParamCategory.DATA, ParamCategory.OBJECT)
    for key, value in config.items():
        if value is not None and known[key].category in outside:
            raise StageError(
                f"the key {key} names a file, data set or code of the user's, whose content is no "
                "part of the cache key",
                where=f"olive: {name}: config.{key}",
                remedy="run this pass with Olive itself",
            )


@dataclass
class _Spoken(logging.Handler):
    """Everything that Olive logs during a pass."""

    records: list[logging.LogRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def last(self) -> str | None:
        """The last thing said."""
        return f"Olive said: {self.records[-1].getMessage()}" if self.records else None

    def refused(self, accepted: Sequence[str]) -> list[str]:
        """Errors, and the warnings that no pattern accepts."""
        texts = dict.fromkeys(
            record.getMessage()
            for record in self.records
            if record.levelno >= logging.ERROR
            or (record.levelno >= logging.WARNING and not _matches(record, accepted))
        )
        return list(texts)

    # a dataclass with fields compares by value and so has no hash, which logging needs
    __hash__ = logging.Handler.__hash__


def _matches(record: logging.LogRecord, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(record.getMessage(), pattern) for pattern in patterns)


@contextlib.contextmanager
def _quiet() -> Iterator[_Spoken]:
    """Collects what Olive logs, and keeps what it and its tools print off the terminal."""
    # Running a single pass sends nothing; this says so to whatever Olive imports.
    os.environ.setdefault("OLIVE_DISABLE_TELEMETRY", "1")
    output = io.StringIO()
    spoken = _Spoken()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):
            importlib.import_module("olive")  # its import sets up the logger that is taken over
        logger = logging.getLogger("olive")
        handlers, level = logger.handlers, logger.level
        logger.handlers = [spoken]
        logger.setLevel(logging.INFO)
        try:
            yield spoken
        finally:
            logger.handlers, logger.level = handlers, level
