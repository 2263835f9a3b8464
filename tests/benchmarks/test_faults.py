"""Each class of fault changes what it says it changes, and nothing is judged right by chance."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults.folder_faults import FOLDER_FAULTS
from benchmarks.faults.gguf_faults import GGUF_FAULTS
from benchmarks.faults.graph_faults import GRAPH_FAULTS
from benchmarks.faults.planting import Site, Truth
from benchmarks.faults.stored import GgufWeights, OnnxWeights
from benchmarks.faults.table import table
from benchmarks.faults.trial import CLEAN, Trial, Verdict
from benchmarks.faults.weight_faults import WEIGHT_FAULTS
from phiconv.checkpoint import Checkpoint
from tests.diagnosis.conftest import export
from tests.gguf.conversions import convert
from tests.phi3_checkpoints import write_phi3_checkpoint

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """As many key/value heads as others, a sliding window."""
    return write_phi3_checkpoint(folder / "plain", num_key_value_heads=4, sliding_window=100)


@pytest.fixture(scope="module")
def longrope(folder: Path) -> Path:
    """Grouped heads, half of each rotated, LongRoPE."""
    return write_phi3_checkpoint(
        folder / "longrope",
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        partial_rotary_factor=0.5,
        rope_scaling={"type": "longrope", **FACTORS},
    )


@pytest.fixture(scope="module")
def int4(folder: Path, plain: Path) -> Path:
    return export(plain, folder / "int4", "cpu", "fp32", int4=True)


@pytest.fixture(scope="module")
def fp16(folder: Path, longrope: Path) -> Path:
    return export(longrope, folder / "fp16", "cuda", "fp16")


@pytest.fixture(scope="module")
def gguf(folder: Path, longrope: Path) -> Path:
    convert(longrope, folder / "gguf", "Q8_0")
    (file,) = (folder / "gguf").glob("*.gguf")
    return file


def site(artifact: Path, scratch: Path, checkpoint: Path) -> Site:
    copy, other = scratch / "copy" / artifact.name, scratch / "other" / artifact.name
    for target in (copy, other):
        target.parent.mkdir(parents=True)
        copier: Callable[..., object] = shutil.copytree if artifact.is_dir() else shutil.copyfile
        copier(artifact, target)
    opened = Checkpoint(checkpoint)
    tokens = [index % 3 for index in range(opened.config.vocab_size)]
    return Site(copy, other, other, opened, tokens, random.Random(0))


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name: file.read_bytes() for file in files}


def assert_planted(truth: Truth | None, place: Site) -> None:
    changed = contents(place.path) != contents(place.other)
    assert (truth is not None) == changed
    if truth is not None:
        assert truth.what
        assert truth.components or truth.words


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
@pytest.mark.parametrize("kind", ["int4", "fp16", "gguf"])
def test_faults_in_weights(
    kind: str, fault: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue("plain" if kind == "int4" else "longrope")
    place = site(request.getfixturevalue(kind), tmp_path, checkpoint)
    reader = GgufWeights if kind == "gguf" else OnnxWeights
    weights, other = (reader(path, place.checkpoint.config) for path in (place.path, place.other))
    if fault == "weight of another checkpoint":
        for array in (array for weight in other.matrices.values() for array in weight.arrays):
            array[:] = np.roll(array, 1, axis=0)
    truth = WEIGHT_FAULTS[fault](weights, other, place)
    if isinstance(weights, GgufWeights):
        weights.flush()
    assert_planted(truth, place)


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
@pytest.mark.parametrize("kind", ["int4", "fp16"])
def test_faults_in_graphs(
    kind: str, fault: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue("plain" if kind == "int4" else "longrope")
    place = site(request.getfixturevalue(kind), tmp_path, checkpoint)
    graph = OnnxWeights(place.path, place.checkpoint.config)
    truth = GRAPH_FAULTS[fault](graph, place)
    if truth is not None:
        graph.save()
    assert_planted(truth, place)


@pytest.mark.parametrize("fault", sorted(set(FOLDER_FAULTS) - {"stale data"}))
def test_faults_beside_the_graph(fault: str, int4: Path, plain: Path, tmp_path: Path) -> None:
    place = site(int4, tmp_path, plain)
    assert_planted(FOLDER_FAULTS[fault](place), place)


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_faults_in_gguf_files(fault: str, gguf: Path, longrope: Path, tmp_path: Path) -> None:
    place = site(gguf, tmp_path, longrope)
    weights = GgufWeights(place.path, place.checkpoint.config)
    truth = GGUF_FAULTS[fault](weights, place)
    weights.flush()
    assert_planted(truth, place)


def test_the_table_counts_by_class() -> None:
    trials = [Trial("m", "k", name, 0) for name in (CLEAN, "bit", "bit", "row")]
    verdicts = [
        Verdict(trials[0], "nothing", kl_mean=0.01),
        Verdict(trials[1], "bit 3", kl_mean=0.01002),
        Verdict(trials[2], "bit 30", ["weights.faults"], named_right=True),
        Verdict(trials[3], "row 1", ["weights.faults"], said="layer 2"),
    ]
    text = table(verdicts)
    assert "| bit | 2 | 1 | 1 | weights.faults 1 |" in text
    assert "| all | 3 | 2 | 1 | weights.faults 2 |" in text
    assert "0 of 1 clean artifacts raise an alarm." in text
    assert "| bit: bit 3 | m k | 0.010020, 0.010000 | finds nothing |" in text
    assert "| row: row 1 | m k | weights.faults | layer 2 |" in text
