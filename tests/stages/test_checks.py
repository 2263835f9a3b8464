"""What a check says; what it finds is tested where it is found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis.diagnose import artifact_weights
from phiconv.machine import CPU, CUDA
from phiconv.report.results import Provenance
from phiconv.runtimes.placement import count_nodes, placed_nodes, stray_nodes
from phiconv.stages.checks import Checked, check_placement, check_weights
from phiconv.stages.stage import SilentProgress
from tests.diagnosis.conftest import TINY, export
from tests.diagnosis.planting import change, planted
from tests.outlier_checkpoints import inject_outliers
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.terminal import Terminal


@dataclass(frozen=True)
class Node:
    """As ONNX Runtime's EpAssignedNode."""

    op_type: str
    name: str


@dataclass(frozen=True)
class Subgraph:
    """As ONNX Runtime's EpAssignedSubgraph: what it gave to a provider."""

    ep_name: str
    nodes: tuple[Node, ...]

    def get_nodes(self) -> tuple[Node, ...]:
        return self.nodes


class Recorded:
    """A session with such a record."""

    def __init__(self, *subgraphs: Subgraph) -> None:
        self._subgraphs = subgraphs

    def get_provider_graph_assignment_info(self) -> tuple[Subgraph, ...]:
        return self._subgraphs


# How the CUDA provider of onnxruntime-gpu 1.31.1 divides the graph of recipes/int4-cuda.yaml, one
# layer of it: what computes a length on the way to a value of the CPU stays there.
LENGTHS = (
    Node("Gather", "/model/attn_mask_reformat/attn_mask_subgraph/Gather"),
    Node("Cast", "/model/attn_mask_reformat/attn_mask_subgraph/Gather/Cast"),
)
LAYER = (
    Node("MatMulNBits", "/model/layers.0/attn/qkv_proj/MatMul_Q4"),
    Node("GroupQueryAttention", "/model/layers.0/attn/GroupQueryAttention"),
    Node(
        "SkipSimplifiedLayerNormalization", "/model/layers.0/post_attention_layernorm/SkipLayerNorm"
    ),
)
HEAD = Node("MatMulNBits", "/lm_head/MatMul_Q8")


def checked(*subgraphs: Subgraph, provider: str = CUDA) -> Checked:
    nodes = placed_nodes(Recorded(*subgraphs))
    return check_placement(
        Provenance(
            runtime="onnxruntime",
            runtime_version="1.31.1",
            target_provider=provider,
            provider=provider,
            placement=count_nodes(nodes),
            strays=stray_nodes(nodes, provider),
        )
    )


def test_lengths_on_the_cpu_are_as_they_should_be() -> None:
    found = checked(Subgraph(CPU, LENGTHS), Subgraph(CUDA, (*LAYER, HEAD)))
    (check,) = found.checks
    assert check.state == "clean"
    assert check.summary == (
        "4 nodes on CUDAExecutionProvider; 2 nodes on CPUExecutionProvider, none of them MatMul "
        "or attention"
    )
    assert found.counts == {"placement.fallback": 0}


def test_work_on_the_cpu_is_counted_and_named() -> None:
    found = checked(Subgraph(CPU, (*LENGTHS, HEAD)), Subgraph(CUDA, LAYER))
    (check,) = found.checks
    assert check.state == "errors"
    assert check.summary.startswith(
        "1 MatMul or attention node fell back from CUDAExecutionProvider; 3 nodes on CUDA"
    )
    assert check.findings == ("MatMulNBits /lm_head/MatMul_Q8 on CPUExecutionProvider",)
    assert found.counts == {"placement.fallback": 1}


@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_one_provider_for_everything(provider: str) -> None:
    (check,) = checked(Subgraph(provider, LAYER), provider=provider).checks
    assert (check.state, check.summary) == ("clean", f"3 nodes on {provider}")
    (check,) = checked(provider=provider).checks
    assert check.summary == f"every node on {provider}, the only provider"


class TestWeights:
    """What a measurement's texts do not show."""

    @pytest.fixture(scope="class")
    def int4(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return export(TINY, tmp_path_factory.mktemp("weights") / "int4", "cpu", "fp32", int4=True)

    @staticmethod
    def weights(artifact: Path, checkpoint: Path = TINY) -> Checked:
        opened = Checkpoint(checkpoint)
        return check_weights(
            lambda: artifact_weights(artifact, opened),
            opened,
            threads=2,
            progress=SilentProgress(),
        )

    def test_clean(self, int4: Path) -> None:
        found = self.weights(int4)
        (check,) = found.checks
        assert (check.state, found.counts) == ("clean", {"weights.faults": 0})
        assert check.summary == "39 weights compared with the checkpoint's"

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("model.embed_tokens.weight", "embed_tokens"),
            ("lm_head.MatMul.weight_Q8", "lm_head"),
        ],
    )
    def test_rows_of_tokens_that_no_text_has(
        self, int4: Path, tmp_path: Path, name: str, place: str
    ) -> None:
        def exchanged(rows: np.ndarray) -> np.ndarray:
            rows[[3516, 3517]] = rows[[17, 3516]]
            return rows

        edited = planted(int4, tmp_path / "x", lambda model: change(model, name, exchanged))
        found = self.weights(edited)
        assert found.counts == {"weights.faults": 1}
        (line,) = found.checks[0].findings
        assert line.startswith(f"error: {place}: SQNR ")
        assert "16 of 28160 blocks are wrong" in line

    def test_one_bit_of_one_scale(self, int4: Path, tmp_path: Path) -> None:
        def sign(scales: np.ndarray) -> np.ndarray:
            scales[1000] *= -1
            return scales

        name = "model.layers.2.attn.o_proj.MatMul.weight_scales"
        edited = planted(int4, tmp_path / "x", lambda model: change(model, name, sign))
        (check,) = self.weights(edited).checks
        assert check.state == "errors"
        assert check.summary == "39 weights compared with the checkpoint's, 1 fault"
        assert "layer 2, self_attn.o_proj: " in check.findings[0]
        assert (
            "1 of 2048 blocks is wrong, the worst in row 125, columns 0 to 31"
            in (check.findings[0])
        )

    def test_weights_that_are_none_of_the_checkpoints_are_left_to_the_logits(
        self, tmp_path: Path
    ) -> None:
        one = write_phi3_checkpoint(tmp_path / "one", seed=1)
        other = write_phi3_checkpoint(tmp_path / "other", seed=2)
        found = self.weights(export(one, tmp_path / "artifact", "cpu", "fp32"), other)
        (check,) = found.checks
        assert (check.state, found.counts) == ("warnings", {})
        assert "are unlike the checkpoint's: another model's, or rotated" in check.summary

    def test_a_graph_that_is_no_decoder_is_not_checked(self, int4: Path, tmp_path: Path) -> None:
        def unnamed(model: ir.Model) -> None:
            model.graph.outputs[0].name = "scores"

        (check,) = self.weights(planted(int4, tmp_path / "x", unnamed)).checks
        assert check.state == "not_checked"
        assert check.summary == "cannot be read: the model has no output 'logits'"


GPTQ = """
  - {id: onnx, uses: export-onnx, with: {provider: cpu}}
  - id: awq
    uses: awq
    with: {scale: false, group_size: 32, symmetric: false, search: mse, calibration: {windows: 8}}
  - id: int4
    uses: quantize
    from: [onnx, awq]
    with: {block_size: 32, symmetric: false, search: mse}
"""
IMPORTANCE = """
  - {id: gguf, uses: convert-gguf, with: {file_type: %s, importance: {windows: 8}}}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "runtime"),
    [
        (GPTQ, "onnxruntime"),
        (IMPORTANCE % "Q4_K_M", "llama.cpp"),
        (IMPORTANCE % "Q6_K", "llama.cpp"),
    ],
    ids=["GPTQ", "Q4_K_M", "Q6_K"],
)
def test_rounding_with_an_eye_to_the_output_is_no_fault(
    stages: str, runtime: str, phiconv: Terminal, tmp_path: Path
) -> None:
    """Outlier channels make single blocks give way: the most that such rounding does."""
    inject_outliers(TINY, tmp_path / "outliers")
    check = f"runtime: {runtime}, windows: 2, window_length: 64, generate_tokens: 4"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"schema: 1\nname: x\nmodel: {{source: {(tmp_path / 'outliers').as_posix()}}}\n"
        f"stages:{stages}  - {{id: check, uses: validate, with: {{{check}}}}}\n",
        encoding="utf-8",
    )
    done = phiconv("build", str(recipe), "--out", str(tmp_path / "out"))
    assert done.code == 0, done.out + done.err
    assert "39 weights compared with the checkpoint's" in done.out
