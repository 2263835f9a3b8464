from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.gguf.file_types import FILE_TYPES
from phiconv.runtimes import RUNTIMES, ArtifactFolder, GeneratingRuntime
from phiconv.runtimes import llama_cpp_library as library
from phiconv.runtimes.dequantized import DequantizedWeights
from phiconv.runtimes.llama_cpp import LlamaCppModel, LlamaFile, gguf_file
from phiconv.runtimes.providers import DEQUANTIZED, ProviderChoice, choose_llama_cpp
from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states
from tests.gguf.conversions import convert
from tests.gguf.sentencepiece_tokenizer import sentencepiece_document, write_sentencepiece_tokenizer
from tests.phi3_checkpoints import write_phi3_checkpoint

HERE = ProviderChoice("llama.cpp", "llama.cpp")
STAND_IN = ProviderChoice("llama.cpp", DEQUANTIZED)
WINDOWS = np.random.default_rng(0).integers(8, 290, (2, 96))

needs_llama_cpp = pytest.mark.skipif(
    machine.llama_cpp_binding() is None, reason="no package that carries llama.cpp is installed"
)


def longrope(original: int) -> dict[str, Any]:
    return {
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": original,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1 + i / 10 for i in range(16)],
            "long_factor": [2.0 + i for i in range(16)],
        },
    }


PHI_4_MINI = {
    "hidden_size": 256,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "dtype": "f16",
}


def reference_logits(path: Path, windows: np.ndarray) -> np.ndarray:
    checkpoint = Checkpoint(path)
    head = LanguageModelHead(checkpoint)
    return np.stack([head.logits(h) for h in final_hidden_states(checkpoint, windows)])


def open_model(folder: Path, threads: int = 2) -> LlamaCppModel:
    return LlamaCppModel(ArtifactFolder(folder), HERE, threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", hidden_size=256)


@pytest.fixture(scope="module")
def f32(checkpoint: Path) -> Path:
    convert(checkpoint, checkpoint.parent / "f32", "F32")
    return checkpoint.parent / "f32"


@pytest.fixture(scope="module")
def q4(checkpoint: Path) -> Path:
    convert(checkpoint, checkpoint.parent / "q4", "Q4_K_M")
    return checkpoint.parent / "q4"


@needs_llama_cpp
@pytest.mark.parametrize(
    ("config", "length"),
    [
        pytest.param({}, 96, id="grouped-query"),
        pytest.param({"num_key_value_heads": 4, "dtype": "f32"}, 96, id="multi-head"),
        pytest.param(PHI_4_MINI, 96, id="phi-4-mini"),
        pytest.param(longrope(512), 96, id="longrope-short"),
        pytest.param(longrope(256), 600, id="longrope-long"),
        pytest.param({"sliding_window": 96}, 96, id="within-the-sliding-window"),
    ],
)
def test_logits_are_hugging_faces(config: dict[str, Any], length: int, tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "model", **config)
    windows = np.random.default_rng(1).integers(8, 290, (2, length))
    expected = reference_logits(source, windows)
    for file_type, bound in (("F32", 1e-3), ("F16", 0.05)):
        convert(source, tmp_path / file_type, file_type)
        found = np.stack(list(open_model(tmp_path / file_type).logits(windows)))
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= bound


@needs_llama_cpp
def test_beyond_the_sliding_window_llama_cpp_attends_to_everything(tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "model", sliding_window=32)
    facts = convert(source, tmp_path / "out", "F32")
    assert facts["limits"] == "llama.cpp attends to every position, the model to the last 32"
    error = np.abs(np.stack(list(open_model(tmp_path / "out").logits(WINDOWS)))
                   - reference_logits(source, WINDOWS)).max(axis=(0, 2))  # fmt: skip
    assert error[:32].max() <= 1e-3
    assert error[32:].min() > 1e-3


@needs_llama_cpp
def test_decoding_and_generation(f32: Path) -> None:
    # one thread: on a busy machine several wait for each other at every token
    model = open_model(f32, threads=1)
    assert isinstance(model, GeneratingRuntime)
    window = WINDOWS[0]
    prefill = next(model.logits(window[None]))
    decoded = model.decode_logits(window, 60)
    assert np.abs(decoded - prefill[60:]).max() < 1e-4
    generated = model.generate(window[:20], 12)
    assert 1 <= len(generated) <= 12
    whole = np.concatenate([window[:20], generated])
    chosen = next(model.logits(whole[None])).argmax(axis=1)
    assert chosen[19:-1].tolist() == generated.tolist()


@needs_llama_cpp
def test_generation_ends_where_the_vocabulary_says(f32: Path) -> None:
    file = LlamaFile(gguf_file(f32), vocab_only=True)
    # </s> and <|endoftext|> by their text, <|end|> as the end of a turn
    assert [token for token in range(file.vocab_size) if file.ends_generation(token)] == [2, 3, 6]


@needs_llama_cpp
def test_threads_do_not_change_the_logits(q4: Path) -> None:
    several = [
        next(LlamaCppModel(ArtifactFolder(q4), HERE, threads).logits(WINDOWS[:1]))
        for threads in (1, 2)
    ]
    assert np.abs(several[0] - several[1]).max() < 1e-4


@needs_llama_cpp
def test_provenance(q4: Path) -> None:
    found = open_model(q4).provenance()
    binding = machine.llama_cpp_binding()
    assert binding is not None
    assert found.runtime == found.provider == found.target_provider == "llama.cpp"
    assert found.where == "on llama.cpp"
    assert " ".join(binding) in found.runtime_version
    assert found.threads == 2
    assert (found.options["type_k"], found.options["flash_attn"]) == ("F32", "off")


@needs_llama_cpp
def test_tokens_of_both_kinds_of_vocabulary(f32: Path, tmp_path: Path) -> None:
    file = LlamaFile(gguf_file(f32), vocab_only=True)
    ids = file.encode("the <|end|> in and \u00e9")
    assert 6 in ids
    assert file.decode(ids) == "the  in and \u00e9"

    folder = write_phi3_checkpoint(tmp_path / "model", vocab_size=700, eos_token_id=9,
                                   pad_token_id=9)  # fmt: skip
    write_sentencepiece_tokenizer(folder, sentencepiece_document())
    convert(folder, tmp_path / "out")
    file = LlamaFile(gguf_file(tmp_path / "out"), vocab_only=True)
    assert file.decode(file.encode("What is the name?")) == "What is the name?"


@needs_llama_cpp
def test_what_is_no_gguf_file(tmp_path: Path, q4: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(StageError, match="one GGUF file is wanted, found: none"):
        open_model(tmp_path / "a")
    (tmp_path / "a" / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StageError, match=r"llama\.cpp does not load the file: ."):
        open_model(tmp_path / "a")
    (tmp_path / "a" / "y.gguf").write_bytes(b"")
    with pytest.raises(StageError, match=r"found: x\.gguf, y\.gguf"):
        open_model(tmp_path / "a")
    whole = gguf_file(q4).read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StageError, match=r"llama\.cpp does not load the file"):
        open_model(tmp_path / "b")


@needs_llama_cpp
def test_weights_that_are_no_valid_blocks_are_refused(q4: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_file(q4).read_bytes())
    tensor = next(t for t in GGUFReader(file).tensors if t.tensor_type.name == "Q4_K")
    with file.open("r+b") as handle:
        handle.seek(tensor.data_offset)
        handle.write(b"\x00\x7c")  # an infinite scale
    with pytest.raises(StageError, match="invalid data"):
        open_model(file)


@needs_llama_cpp
def test_more_tokens_than_the_context_holds(f32: Path) -> None:
    model = open_model(f32)
    with pytest.raises(StageError, match=r"llama\.cpp fails on 96 tokens at position"):
        context = model._fresh(256)
        context.logits(WINDOWS[0])
        context.logits(WINDOWS[1], 96)
        context.logits(WINDOWS[1], 192)


def test_a_binding_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LLAMA_CPP_BINDINGS", {"numpy": "0.0.1"})
    with pytest.raises(EnvironmentLacksError, match="only the structures of numpy"):
        choose_llama_cpp("require")
    assert choose_llama_cpp("fallback-cpu") == STAND_IN
    assert choose_llama_cpp("skip").provider is None


def test_no_binding_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LLAMA_CPP_BINDINGS", {"no-such-package": "1"})
    with pytest.raises(EnvironmentLacksError, match="no package that carries") as caught:
        choose_llama_cpp("require")
    assert "pip install" in str(caught.value.remedy)


@needs_llama_cpp
def test_a_structure_laid_out_otherwise_is_refused() -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (("new", ctypes.c_uint32), *library._ContextParams11549._fields_)

    class Calls:
        llama_model_default_params = staticmethod(
            library.open_library().calls.llama_model_default_params
        )

        @staticmethod
        def llama_context_default_params() -> ctypes.Structure:
            size = ctypes.sizeof(Shifted)
            given = library.open_library().calls.llama_context_default_params()
            raw = ctypes.string_at(ctypes.byref(given), ctypes.sizeof(given)).ljust(size, b"\0")
            return Shifted.from_buffer_copy(raw)

    with pytest.raises(EnvironmentLacksError, match="n_ctx is 2048, not 512"):
        library._check_layout(Calls(), "xllamacpp 1")  # type: ignore[arg-type]


@pytest.mark.parametrize(("file_type", "bound"), [("F32", 0.0), ("BF16", 0.0), ("Q8_0", 0.1)])
def test_the_stand_in_runs_the_weights(
    checkpoint: Path, file_type: str, bound: float, tmp_path: Path
) -> None:
    convert(checkpoint, tmp_path / "out", file_type)
    folder = ArtifactFolder(tmp_path / "out", checkpoint=Checkpoint(checkpoint))
    runtime = RUNTIMES["llama.cpp"](folder, STAND_IN, 2)
    assert isinstance(runtime, DequantizedWeights)
    found = np.stack(list(runtime.logits(WINDOWS)))
    assert np.abs(found - reference_logits(checkpoint, WINDOWS)).max() <= bound
    where = runtime.provenance().where
    assert where == "on dequantized weights in PyTorch, target llama.cpp not present"
    assert not isinstance(runtime, GeneratingRuntime)


def test_the_stand_in_with_a_tied_head_and_without_a_tensor(tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "model", tie_word_embeddings=True, dtype="f32")
    convert(source, tmp_path / "out", "F32")
    folder = ArtifactFolder(tmp_path / "out", checkpoint=Checkpoint(source))
    found = np.stack(list(DequantizedWeights(folder, STAND_IN, 2).logits(WINDOWS)))
    assert np.abs(found - reference_logits(source, WINDOWS)).max() == 0
    larger = write_phi3_checkpoint(tmp_path / "larger", num_hidden_layers=3)
    folder = ArtifactFolder(tmp_path / "out", checkpoint=Checkpoint(larger))
    with pytest.raises(StageError, match=r"the file lacks blk\.2\."):
        DequantizedWeights(folder, STAND_IN, 2)
    (tmp_path / "out" / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(StageError, match="not a GGUF file"):
        DequantizedWeights(folder, STAND_IN, 2)


@needs_llama_cpp
def test_the_library_keeps_its_warnings_to_itself(
    q4: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_model(q4)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@needs_llama_cpp
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_runs(checkpoint: Path, file_type: str, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", file_type)
    found = next(open_model(tmp_path / "out").logits(WINDOWS[:1]))
    expected = reference_logits(checkpoint, WINDOWS[:1])[0]
    assert np.isfinite(found).all()
    # random weights suffer most from few bits
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97
