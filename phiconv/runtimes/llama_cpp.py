"""Runs a GGUF artifact in llama.cpp: logits of every position, decoding, generation, tokens.

For a comparison of logits the KV cache is F32 and flash attention off; both round otherwise. The
context is as long as the tokens in it, because llama.cpp chooses between LongRoPE's factors by the
length of the context, transformers by that of the text.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv import machine
from phiconv.errors import StageError
from phiconv.report.results import Provenance
from phiconv.runtimes.llama_cpp_library import (
    FLASH_ATTENTION_OFF,
    TYPE_F32,
    VOCABULARY_SENTENCEPIECE,
    Batch,
    Library,
    open_library,
)
from phiconv.runtimes.providers import ProviderChoice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.runtimes import ArtifactFolder

_UBATCH = 512
_PIECE_BYTES = 256


def gguf_file(folder: Path) -> Path:
    """The GGUF file of an artifact's folder, or the file itself.

    Raises:
        StageError: There is none, or several.
    """
    if folder.is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise StageError(f"one GGUF file is wanted, found: {found}", where=str(folder))
    return files[0]


class LlamaFile:
    """An opened GGUF file; its memory is given back with the object.

    Args:
        path: The file.
        vocab_only: Read no weights.

    Raises:
        EnvironmentLacksError: There is no llama.cpp.
        StageError: llama.cpp does not load the file; weights that are no valid blocks count.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False):
        self.path = path
        self.library: Library = open_library()
        calls = self.library.calls
        params = calls.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        params.check_tensors = not vocab_only
        self.model: int | None = calls.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise StageError(
                f"llama.cpp does not load the file: {self.library.last_words()}", where=str(path)
            )
        weakref.finalize(self, calls.llama_model_free, self.model)
        self.vocabulary: int = calls.llama_model_get_vocab(self.model)

    @property
    def vocab_size(self) -> int:
        """How many tokens the file has."""
        return int(self.library.calls.llama_vocab_n_tokens(self.vocabulary))

    @property
    def chat_template(self) -> str | None:
        """The template that the file holds."""
        found = self.library.calls.llama_model_chat_template(self.model, None)
        return None if found is None else str(found.decode())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such, none added."""
        raw = text.encode()
        capacity = len(raw) + 8
        ids = (ctypes.c_int32 * capacity)()
        call = self.library.calls.llama_tokenize
        count = call(self.vocabulary, raw, len(raw), ids, capacity, False, True)
        if count < 0:
            raise StageError("llama.cpp finds more tokens than bytes", where=str(self.path))
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, from the bytes of the single tokens.

        A SentencePiece text begins with the space that encoding put there; it is taken off.
        """
        calls = self.library.calls
        text = b"".join(map(self.piece, ids)).decode(errors="replace")
        if calls.llama_vocab_type(self.vocabulary) == VOCABULARY_SENTENCEPIECE:
            text = text.removeprefix(" ")
        return text

    def piece(self, token: int) -> bytes:
        """The bytes of one token; a special token has none."""
        call = self.library.calls.llama_token_to_piece
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = call(self.vocabulary, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def ends_generation(self, token: int) -> bool:
        """Whether llama.cpp stops at this token."""
        return bool(self.library.calls.llama_vocab_is_eog(self.vocabulary, token))

    def render(
        self, messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool
    ) -> str | None:
        """A conversation as llama.cpp's own templates write it, which the file's template selects.

        Args:
            messages: Role and content of each turn.
            add_generation_prompt: Whether the answer's beginning is written, too.

        Returns:
            The text; None when llama.cpp does not know the file's template.
        """
        if self.chat_template is None:
            return None
        turns = (_ChatMessage * len(messages))(
            *(_ChatMessage(role.encode(), content.encode()) for role, content in messages)
        )
        call = self.library.calls.llama_chat_apply_template
        size = 2 * sum(len(content.encode()) for _, content in messages) + 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = call(
                self.chat_template.encode(),
                ctypes.cast(turns, ctypes.c_void_p),
                len(messages),
                add_generation_prompt,
                buffer,
                size,
            )
            if count < 0:
                return None
            if count <= size:
                return buffer.raw[:count].decode(errors="replace")
            size = count


class _ChatMessage(ctypes.Structure):
    _fields_ = (("role", ctypes.c_char_p), ("content", ctypes.c_char_p))


class Context:
    """A KV cache of a given length on an opened file.

    Args:
        file: The file.
        length: How many tokens it is for.
        threads: Threads of llama.cpp.
        watcher: A `ggml_backend_sched_eval_callback`, told of every value that is computed; the
            caller keeps it as long as the context lives.

    Raises:
        StageError: llama.cpp makes no such context.
    """

    def __init__(
        self,
        file: LlamaFile,
        length: int,
        threads: int,
        watcher: ctypes.c_void_p | None = None,
    ):
        self._file = file
        self._calls = file.library.calls
        self.length = length
        params = self._calls.llama_context_default_params()
        params.n_ctx = params.n_batch = length
        params.n_ubatch = min(length, _UBATCH)
        params.n_outputs_max = params.n_outputs_max_per_seq = 0  # as many as n_batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.type_k = params.type_v = TYPE_F32
        params.offload_kqv = False
        params.cb_eval = watcher
        self._pointer = self._calls.llama_init_from_model(file.model, params)
        if not self._pointer:
            raise StageError(
                f"llama.cpp makes no context of {length} tokens: {file.library.last_words()}",
                where=str(file.path),
            )
        weakref.finalize(self, self._calls.llama_free, self._pointer)

    def clear(self) -> None:
        """Forgets every token."""
        self._calls.llama_memory_clear(self._calls.llama_get_memory(self._pointer), True)

    def logits(self, tokens: NDArray[np.int64], start: int = 0) -> NDArray[np.float32]:
        """Appends tokens at position `start`; logits [T, V] of each, in llama.cpp's own memory."""
        import numpy as np

        count = len(tokens)
        sequence = ctypes.pointer(ctypes.c_int32(0))
        batch = Batch(
            n_tokens=count,
            token=(ctypes.c_int32 * count)(*tokens.tolist()),
            pos=(ctypes.c_int32 * count)(*range(start, start + count)),
            n_seq_id=(ctypes.c_int32 * count)(*([1] * count)),
            seq_id=(ctypes.POINTER(ctypes.c_int32) * count)(*([sequence] * count)),
            logits=(ctypes.c_int8 * count)(*([1] * count)),
        )
        status = self._calls.llama_decode(self._pointer, batch)
        if status != 0:
            raise StageError(
                f"llama.cpp fails on {count} tokens at position {start} (status {status}): "
                f"{self._file.library.last_words()}",
                where=str(self._file.path),
            )
        found = self._calls.llama_get_logits(self._pointer)
        return np.ctypeslib.as_array(found, (count, self._file.vocab_size))


class LlamaCppModel:
    """A GGUF artifact in llama.cpp; see `phiconv.runtimes.GeneratingRuntime`.

    Args:
        folder: The artifact.
        choice: Where it is to run.
        threads: Threads of llama.cpp.

    Raises:
        EnvironmentLacksError: There is no llama.cpp.
        StageError: The artifact cannot be loaded.
    """

    def __init__(self, folder: ArtifactFolder, choice: ProviderChoice, threads: int):
        self._choice = choice
        self._threads = threads
        self._file = LlamaFile(gguf_file(folder.path))
        self._context: Context | None = None

    def logits(self, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yields the logits of each window, see `phiconv.runtimes.Runtime.logits`."""
        for window in windows:
            yield self._fresh(len(window)).logits(window).copy()

    def decode_logits(self, window: NDArray[np.int64], prefill: int) -> NDArray[np.float32]:
        """Logits of later positions by decoding, see `phiconv.runtimes.GeneratingRuntime`."""
        import numpy as np

        context = self._fresh(len(window))
        context.logits(window[:prefill])
        rows = [
            context.logits(window[position : position + 1], position)[0].copy()
            for position in range(prefill, len(window))
        ]
        return np.stack(rows)

    def generate(self, prompt: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
        """Greedy continuation, see `phiconv.runtimes.GeneratingRuntime`."""
        import numpy as np

        context = self._fresh(len(prompt) + tokens)
        token = int(context.logits(prompt)[-1].argmax())
        generated = [token]
        while len(generated) < tokens and not self._file.ends_generation(token):
            position = len(prompt) + len(generated) - 1
            token = int(context.logits(np.array([token]), position)[0].argmax())
            generated.append(token)
        return np.array(generated, dtype=np.int64)

    def provenance(self) -> Provenance:
        """Says which build of llama.cpp ran and how."""
        return provenance(self._choice, self._threads)

    def _fresh(self, length: int) -> Context:
        """An empty context for this many tokens."""
        if self._context is None or self._context.length != length:
            self._context = None  # gives the memory of the last one back first
            self._context = Context(self._file, length, self._threads)
        self._context.clear()
        return self._context


def provenance(choice: ProviderChoice, threads: int) -> Provenance:
    """Which build of llama.cpp runs GGUF files here, and how.

    Raises:
        EnvironmentLacksError: There is no llama.cpp.
    """
    library = open_library()
    return Provenance(
        runtime=machine.LLAMA_CPP,
        runtime_version=library.version,
        target_provider=choice.target,
        provider=machine.LLAMA_CPP,
        device=machine.processor(),
        threads=threads,
        options={
            "type_k": "F32",
            "type_v": "F32",
            "flash_attn": "off",
            "n_ubatch": str(_UBATCH),
            "system_info": library.system_info,
        },
    )
