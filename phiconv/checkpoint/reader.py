"""A checkpoint on disk: checked when opened, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.adapter import refuse_adapter
from phiconv.checkpoint.config import EMBEDDING, LM_HEAD, ModelConfig
from phiconv.checkpoint.digests import DigestCache, OnBytes, digest_files, file_size
from phiconv.checkpoint.folder import CONFIG, member, shaping_files
from phiconv.checkpoint.json_object import read_json_object
from phiconv.checkpoint.packed import PackedWeights
from phiconv.checkpoint.problems import NAMES_SHOWN, attempt, combined, name_list
from phiconv.checkpoint.safetensors_file import FLOATS, NUMBERS, StoredDtype, TensorInfo
from phiconv.checkpoint.weights import Weights, open_weights
from phiconv.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    from phiconv.checkpoint.weight_source import Grid, RoundedWeights


class Checkpoint:
    """A Phi-3 checkpoint whose config and tensors agree.

    Opening reads the config and the headers of the weight files, but no weights. Reading is
    thread-safe; nothing stays open or mapped.

    Args:
        path: The folder.
        source: What the user named, if not the folder.
        revision: The commit of the Hub repository that the folder is a snapshot of.
        digest_cache: Where digests of the files are looked up and kept.

    Attributes:
        source: What the user named: a folder or a Hub id.
        revision: The commit on the Hub, or None for a folder.
        path: The folder that holds the files, absolute.
        config: The normalised config.
        raw_config: config.json as it is.
        tensors: Every tensor by name, in the order of the files and within each as stored.
        files: The names of config, tokenizer, generation config, chat template and licence files
            present, sorted.
        weight_files: The names of the safetensors files, sorted.
        rounded: The weights that are integer codes already, in a quantized checkpoint. They are
            among `tensors` too, as float32.

    Raises:
        CheckpointError: The checkpoint is incomplete, broken or unsupported. Everything that
            config and headers show is reported.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        source: str | None = None,
        revision: str | None = None,
        digest_cache: DigestCache | None = None,
    ):
        self.path = Path(path).absolute()
        self.source = str(path) if source is None else source
        self.revision = revision
        names = _list_folder(self.path)
        refuse_adapter(self.path)
        self.files: tuple[str, ...] = shaping_files(names)
        errors: list[CheckpointError] = []
        raw_config = attempt(errors, read_config, self.path)
        config = None
        if raw_config is not None:
            where = str(self.path / CONFIG)
            config = attempt(errors, ModelConfig.from_dict, raw_config, where)
        plain = config is not None and config.quantization is None
        weights = attempt(errors, open_weights, self.path, names, FLOATS if plain else NUMBERS)
        for name in self.files:
            if name != CONFIG:
                attempt(errors, member, self.path, name)
        packed, tensors = None, weights.tensors if weights else {}
        if config and weights:
            packed = attempt(errors, _open_packed, config, weights, self.path)
            if packed is not None:
                tensors = packed.in_place_of_parts(tensors)
            if plain or packed is not None:
                errors.extend(_check_tensors(config, tensors, str(self.path)))
        if errors or raw_config is None or config is None or weights is None:
            raise combined(errors)
        self.raw_config: dict[str, Any] = raw_config
        self.config: ModelConfig = config
        self.tensors: Mapping[str, TensorInfo] = tensors
        self.weight_files: tuple[str, ...] = tuple(weights.files)
        self._weights = weights.files
        self._digest_cache = digest_cache
        self._digests: dict[str, str] | None = None
        self.rounded: RoundedWeights | None = packed
        self._packed = packed

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> StoredDtype:
        """The stored dtype of most bytes."""
        count: Counter[StoredDtype] = Counter()
        for info in self.tensors.values():
            count[info.dtype] += info.nbytes
        return count.most_common(1)[0][0]

    @property
    def lm_head(self) -> str:
        """The name of the tensor that is the head's weight.

        A tied checkpoint may hold `lm_head.weight` nevertheless; transformers then uses it.
        """
        return LM_HEAD if LM_HEAD in self.tensors else EMBEDDING

    def for_grid(self, grid: Grid) -> Checkpoint:
        """The checkpoint: nothing in it is for one grid only."""
        return self

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Reads a whole tensor.

        Args:
            name: The tensor.

        Returns:
            A new array of the tensor's shape; bf16 has the dtype `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: There is no such tensor, or its file was changed since it was opened.
        """
        info = self._info(name)
        if self._packed is not None and name in self._packed.tensors:
            return self._packed.read_dense(name, 0, info.shape[0])
        return self._weights[info.file].read_items(info, 0, info.shape)

    def read_rows(
        self, name: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Reads rows `[start, stop)` of a tensor's first axis.

        Args:
            name: The tensor.
            start: The first row.
            stop: One past the last row.
            out: Where to read to: C-contiguous, of shape `[stop - start, ...]` and of the stored
                dtype, or uint16 for the bits of bf16. By default a new array.

        Returns:
            `out`, or the new array; bf16 has the dtype `ml_dtypes.bfloat16`.

        Raises:
            CheckpointError: There is no such tensor, or its file was changed since it was opened.
            IndexError: The tensor has no such rows.
            ValueError: `out` does not fit.
        """
        file = self._weights[self._info(name).file]
        if self._packed is not None and name in self._packed.tensors:
            return self._packed.read_dense(name, start, stop, out)
        return file.read_rows(name, start, stop, out)

    def hash_files(
        self, *, threads: int | None = None, on_bytes: OnBytes | None = None
    ) -> dict[str, str]:
        """The digest of every file that shapes the output, computed at the first call.

        Args:
            threads: How many files are hashed at a time; by default one for each core.
            on_bytes: Called, from any thread, with counts of bytes hashed. They add up to
                `file_nbytes`.

        Returns:
            File name to `blake3:<64 hexadecimal digits>`, sorted.

        Raises:
            CheckpointError: A file cannot be read, or was changed meanwhile.
        """
        if self._digests is None:
            names = sorted((*self.files, *self.weight_files))
            paths = [self.path / name for name in names]
            digests = digest_files(
                paths, cache=self._digest_cache, threads=threads, on_bytes=on_bytes
            )
            self._digests = dict(zip(names, digests, strict=True))
        return dict(self._digests)

    def is_hashed(self) -> bool:
        """Whether `hash_files` needs to read no file."""
        if self._digests is not None:
            return True
        paths = [self.path / name for name in (*self.files, *self.weight_files)]
        return self._digest_cache is not None and len(self._digest_cache.find(paths)) == len(paths)

    @property
    def file_nbytes(self) -> int:
        """Bytes of all files that shape the output."""
        return sum(file_size(self.path / name) for name in (*self.files, *self.weight_files))

    @property
    def digests(self) -> dict[str, str]:
        """`hash_files` with its defaults."""
        return self.hash_files()

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of `digests`, 64 hexadecimal digits."""
        text = json.dumps(self.digests, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"there is no tensor {name!r}", where=str(self.path)) from None


def _open_packed(config: ModelConfig, weights: Weights, path: Path) -> PackedWeights | None:
    """The weights that are stored as integers; None where none are.

    Raises:
        CheckpointError: As `PackedWeights`.
    """
    if config.quantization is None:
        return None
    head = {LM_HEAD: (config.vocab_size, config.hidden_size)}
    shapes = config.expected_tensors() | head
    del shapes[EMBEDDING]
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    return PackedWeights(config.quantization, weights.files, matrices, path)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a checkpoint's folder.

    Raises:
        CheckpointError: It is missing, leads out of the folder or is no valid JSON object.
    """
    return read_json_object(member(folder, CONFIG))


def _list_folder(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot be listed: {error.strerror}", where=str(folder)) from error
    if not names:
        raise CheckpointError(
            "the folder is empty",
            where=str(folder),
            remedy="give the folder of a Hugging Face checkpoint with all of its files",
        )
    return names


def _check_tensors(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], where: str
) -> list[CheckpointError]:
    """Compares the tensors with those of the architecture."""
    expected = config.expected_tensors()
    errors: list[CheckpointError] = []
    if missing := [name for name in expected if name not in tensors]:
        errors.append(
            CheckpointError(
                f"missing tensors: {name_list(missing)}",
                where=where,
                remedy="the checkpoint is incomplete; download or save it again",
            )
        )
    allowed = expected | {LM_HEAD: (config.vocab_size, config.hidden_size)}
    if extra := [name for name in tensors if name not in allowed]:
        errors.append(
            CheckpointError(
                f"tensors that {config.architecture} does not have: {name_list(extra)}",
                where=where,
                remedy="leaving them out would change the model; remove them if they are not used",
            )
        )
    wrong = [
        f"{name!r} is {list(info.shape)}, not {list(allowed[name])}"
        for name, info in tensors.items()
        if name in allowed and info.shape != allowed[name]
    ]
    if wrong:
        more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        errors.append(
            CheckpointError(
                f"shapes that config.json does not give: {', '.join(wrong[:NAMES_SHOWN])}{more}",
                where=where,
                remedy="config.json and the weights do not belong together",
            )
        )
    return errors
