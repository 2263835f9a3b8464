"""Clean artifacts of the trained example checkpoint, which the tests copy and break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from phiconv.onnx.quantize import Target, WeightInfo, quantize_graph
from phiconv.onnx.target import Precision, Provider
from tests.onnx.models import lay_out, write

TINY = Path(__file__).parents[2] / "examples" / "tiny-phi3"


def export(
    checkpoint: Path, folder: Path, provider: Provider, precision: Precision, *, int4: bool = False
) -> Path:
    """An artifact as a build ships it; int4 is block 32, symmetric, with an int8 head."""
    graph = lay_out(checkpoint, folder.with_name(folder.name + "-graph"), provider, precision)

    def target(weight: WeightInfo) -> Target | None:
        bits = {"body": 4, "lm_head": 8}.get(weight.role)
        return None if bits is None else Target(bits, 32, True, "none", 4)

    if int4:
        quantize_graph(graph, target)
    write(graph, checkpoint, folder)
    assert graph.genai is not None
    shutil.copytree(graph.genai, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diagnosis")


@pytest.fixture(scope="session")
def fp32(folder: Path) -> Path:
    return export(TINY, folder / "fp32", "cpu", "fp32")


@pytest.fixture(scope="session")
def int4(folder: Path) -> Path:
    """What recipes/int4-cpu.yaml makes: accuracy level 4."""
    return export(TINY, folder / "int4", "cpu", "fp32", int4=True)


@pytest.fixture(scope="session")
def dml_fp16(folder: Path) -> Path:
    """Separate rotary embedding, unpacked q, k, v, a position_ids input, fp16 throughout."""
    return export(TINY, folder / "dml-fp16", "dml", "fp16")
