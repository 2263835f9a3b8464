"""Faults planted in GGUF files of the example checkpoints are named; clean files have none."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis import Diagnosis
from phiconv.diagnosis.diagnose_gguf import diagnose_gguf, gguf_weights
from phiconv.diagnosis.verdict import failed_gates
from phiconv.errors import StageError
from phiconv.runtimes.providers import DEQUANTIZED, ProviderChoice
from phiconv.stages.checks import check_weights
from phiconv.stages.stage import SilentProgress
from phiconv.tokens import load_token_set
from tests.diagnosis.conftest import TINY
from tests.gguf.conversions import convert
from tests.gguf.rewriting import rewrite

HERE = ProviderChoice(machine.LLAMA_CPP, machine.LLAMA_CPP)
STAND_IN = ProviderChoice(machine.LLAMA_CPP, DEQUANTIZED)
WEIGHTS, RUNTIME = "quantized weights", "llama.cpp"

needs_llama_cpp = pytest.mark.skipif(
    machine.llama_cpp_binding() is None, reason="no package that carries llama.cpp is installed"
)


def run(
    file: Path, checkpoint: Path = TINY, *, provider: ProviderChoice = HERE, length: int = 96
) -> Diagnosis:
    opened = Checkpoint(checkpoint)
    tokens = load_token_set("default", opened, windows=2, window_length=length)
    return diagnose_gguf(
        file, opened, provider=provider, tokens=tokens, threads=1, progress=SilentProgress()
    )


def faults(diagnosis: Diagnosis) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(fault.stage, fault.component, fault.layers) for fault in diagnosis.faults]


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("q4") / "gguf"
    convert(TINY, folder, "Q4_K_M")
    return next(folder.glob("*.gguf"))


@pytest.fixture(scope="module")
def f16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f16") / "gguf"
    convert(TINY, folder, "F16")
    return next(folder.glob("*.gguf"))


def data(file: Path, name: str) -> np.ndarray:
    """A tensor as it is stored, to be changed."""
    (tensor,) = (item for item in gguf.GGUFReader(file).tensors if item.name == name)
    return np.array(tensor.data)


@needs_llama_cpp
def test_a_clean_quantized_file(q4: Path) -> None:
    found = run(q4)
    assert found.verdict.startswith("no fault found: mean KL ")
    assert not failed_gates(found.ladder[-1])
    assert [rung.stage for rung in found.ladder if rung.on_path] == ["reference", WEIGHTS, RUNTIME]
    assert [error.layer for error in found.layers] == [-1, 0, 1, 2, 3]
    assert all(error.added is not None and error.added < 0.1 for error in found.layers[1:])
    assert found.provenance.provider == machine.LLAMA_CPP
    # 8 steps a layer, the embedding, the final norm and the head
    assert len(found.operators) == 8 * 4 + 3
    assert {tensor.status for tensor in found.tensors} == {"ok"}
    assert {tensor.format for tensor in found.tensors} == {"Q4_K", "Q6_K", "f32"}


@needs_llama_cpp
def test_a_clean_tied_file_with_grouped_heads_and_longrope(tmp_path: Path) -> None:
    mini = TINY.parent / "tiny-phi4-mini"
    convert(mini, tmp_path / "gguf", "Q8_0")
    found = run(next((tmp_path / "gguf").glob("*.gguf")), mini, length=64)
    assert found.verdict.startswith("no fault found: mean KL ")
    assert found.ladder[-1].kl_mean is not None
    assert found.ladder[-1].kl_mean < 1e-3
    (head,) = (tensor for tensor in found.tensors if tensor.component == "lm_head")
    assert head.initializer == "token_embd.weight"


@needs_llama_cpp
def test_one_corrupt_block(q4: Path, tmp_path: Path) -> None:
    packed = data(q4, "blk.1.ffn_down.weight")
    packed[17, 1] ^= 0x40  # the exponent of the first super-block's scale of row 17
    found = run(rewrite(q4, tmp_path / "x.gguf", tensors={"blk.1.ffn_down.weight": packed}))
    assert faults(found)[0] == (WEIGHTS, "mlp.down_proj", (1,))
    assert "in row 17, columns" in found.faults[0].message
    assert "the error enters at stage 'quantized weights', layer 1, mlp.down_proj" in found.verdict


@pytest.mark.parametrize(("planted", "state"), [(0, "clean"), (0x7000, "errors")])
def test_an_importance_matrix_may_give_single_blocks_away(
    q4: Path, tmp_path: Path, planted: int, state: str
) -> None:
    """A block that is lost may be what the matrix wanted; one that is huge may not."""
    packed = data(q4, "blk.1.ffn_down.weight")
    packed[17, :4] = [planted & 0xFF, planted >> 8] * 2  # the super-block's two scales
    tensors = {"blk.1.ffn_down.weight": packed}
    for metadata, expected in (({}, "errors"), ({"quantize.imatrix.entries_count": 16}, state)):
        file = rewrite(q4, tmp_path / f"{expected}.gguf", metadata=metadata, tensors=tensors)
        checkpoint = Checkpoint(TINY)
        found = check_weights(
            partial(gguf_weights, file, checkpoint),
            checkpoint,
            threads=1,
            progress=SilentProgress(),
        )
        assert [check.state for check in found.checks] == [expected]


@needs_llama_cpp
def test_queries_and_keys_swapped(q4: Path, tmp_path: Path) -> None:
    name = "blk.2.attn_qkv.weight"
    packed = data(q4, name)
    rows = Checkpoint(TINY).config.hidden_size
    packed[: 2 * rows] = np.concatenate([packed[rows : 2 * rows], packed[:rows]])
    found = run(rewrite(q4, tmp_path / "x.gguf", tensors={name: packed}))
    assert sorted(faults(found)) == [
        (WEIGHTS, "self_attn.k_proj", (2,)),
        (WEIGHTS, "self_attn.q_proj", (2,)),
    ]
    assert found.faults[0].message.endswith("the two are swapped")


@needs_llama_cpp
def test_a_transposed_weight(f16: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_output.weight"
    turned = np.ascontiguousarray(data(f16, name).T)
    found = run(rewrite(f16, tmp_path / "x.gguf", tensors={name: turned}))
    assert faults(found) == [("weights", "self_attn.o_proj", (0,))]
    assert "is the right weight transposed" in found.faults[0].message


@needs_llama_cpp
def test_another_rotary_base(q4: Path, tmp_path: Path) -> None:
    other = {"phi3.rope.freq_base": 500.0}
    found = run(rewrite(q4, tmp_path / "x.gguf", metadata=other))
    assert faults(found) == [(RUNTIME, "self_attn.rotary", (0, 1, 2, 3))]
    (fault,) = found.faults
    assert fault.message == "rope.freq_base 500, the checkpoint has 10000"
    assert len(fault.evidence) == 4  # attention of every layer is off, and that is why
    assert found.verdict.startswith("the error enters at stage 'llama.cpp', layers 0, 1, 2, 3")


@needs_llama_cpp
def test_another_epsilon_is_named_though_no_logit_shows_it(q4: Path, tmp_path: Path) -> None:
    other = {"phi3.attention.layer_norm_rms_epsilon": 1e-6}
    found = run(rewrite(q4, tmp_path / "x.gguf", metadata=other))
    assert faults(found) == [(RUNTIME, "norms", ())]
    assert not failed_gates(found.ladder[-1])
    assert found.verdict.startswith("a fault at stage 'llama.cpp', norms (")


@needs_llama_cpp
def test_a_norm_of_another_convention(q4: Path, tmp_path: Path) -> None:
    name = "blk.3.ffn_norm.weight"
    found = run(rewrite(q4, tmp_path / "x.gguf", tensors={name: data(q4, name) + 1}))
    assert faults(found)[0] == (WEIGHTS, "post_attention_layernorm", (3,))


@needs_llama_cpp
def test_a_weight_that_llama_cpp_refuses_is_named_all_the_same(q4: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_qkv.weight"
    packed = data(q4, name)
    packed[5, :2] = [0, 0x7E]  # NaN as the scale of a super-block
    found = run(rewrite(q4, tmp_path / "x.gguf", tensors={name: packed}))
    assert faults(found)[0] == (WEIGHTS, "self_attn.q_proj", (0,))
    assert found.faults[0].message.endswith("it holds NaN or infinity")
    assert "does not load" in found.ladder[-1].note
    assert found.layers == found.operators == ()


def test_without_llama_cpp_the_weights_are_looked_at(q4: Path) -> None:
    found = run(q4, provider=STAND_IN)
    assert found.verdict.startswith("no fault found: mean KL ")
    assert [rung.stage for rung in found.ladder if rung.on_path] == ["reference", WEIGHTS]
    assert found.operators == ()
    assert found.provenance.where == f"on {DEQUANTIZED}, target llama.cpp not present"


@pytest.mark.parametrize("provider", [HERE, STAND_IN], ids=["llama.cpp", "stand-in"])
def test_a_missing_tensor(q4: Path, tmp_path: Path, provider: ProviderChoice) -> None:
    if provider == HERE and machine.llama_cpp_binding() is None:
        pytest.skip("no package that carries llama.cpp is installed")
    name = "blk.1.ffn_norm.weight"
    file = rewrite(q4, tmp_path / "x.gguf", tensors={name: None})
    found = run(file, provider=provider)
    (unreadable,) = (tensor for tensor in found.tensors if tensor.status == "unreadable")
    assert unreadable.detail == f"the file has no tensor {name}"
    assert [fault.message for fault in found.faults] == [f"the file lacks {name}"]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(StageError, match="not a sound GGUF file"):
        run(tmp_path / "x.gguf")
