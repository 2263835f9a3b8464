"""Stage `awq`: the overlay it makes, its keys, and that a kill costs it one layer at most."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.errors import StageError
from phiconv.runtimes.activations import LINEAR_LAYERS
from phiconv.stages.awq import Awq, AwqParams
from phiconv.stages.stage import StageContext
from phiconv.workspace import Workspace
from tests.outlier_checkpoints import inject_outliers
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.toy_stages import files_in

ROOT = Path(__file__).parent.parent.parent
LAYERS = 3
SHORT: dict[str, Any] = {
    "tokens": str(ROOT / "README.md"),  # soon tokenized
    "windows": 4,
    "window_length": 64,
    "gram_tokens": 200,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outliers")
    plain = write_phi3_checkpoint(folder / "plain", num_hidden_layers=LAYERS)
    return inject_outliers(plain, folder / "model")


def parameters(**changes: Any) -> AwqParams:
    calibration = {**SHORT, **changes.pop("calibration", {})}
    return AwqParams.model_validate(
        {"group_size": 32, "rounding": "nearest", **changes, "calibration": calibration}
    )


class Interruption(Exception):  # noqa: N818 - stands in for a kill
    """Raised by a progress that has had enough."""


class Fragile:
    """A progress that fails once a layer has come so far."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.notes: list[str] = []
        self.seen: list[str] = []

    def start(self, total: int | None, unit: str = "bytes") -> None:
        self.done, self.total = 0, total

    def advance(self, amount: int, what: str | None = None) -> None:
        self.done += amount
        self.seen.append(str(what))
        if what == self.where:
            raise Interruption

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(
    folder: Path,
    checkpoint: Path,
    params: AwqParams,
    *,
    progress: Fragile | None = None,
    unfinished: Path | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    folder.mkdir(parents=True)
    context = StageContext(
        folder,
        (),
        Checkpoint(checkpoint),
        threads=threads,
        progress=progress or Fragile("never"),
        unfinished=unfinished,
    )
    return Awq().run(params, context)


def test_makes_an_overlay_that_quantize_can_read(checkpoint: Path, tmp_path: Path) -> None:
    facts = run(tmp_path / "out", checkpoint, parameters())
    overlay = Overlay.load(tmp_path / "out")
    assert len(overlay.groups) == 4 * LAYERS
    assert facts["scaled_groups"] == sum(group.scaled for group in overlay.groups) > 0
    assert facts["clipped_weights"] == len(overlay.clips) > 0
    assert overlay.tokens is not None
    assert (overlay.tokens.windows, overlay.tokens.sampled) == (4, 200)
    OverlaidCheckpoint(Checkpoint(checkpoint), overlay, clip=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "overlay.json",
        "overlay.safetensors",
    }


def test_gptq_codes_cover_every_weight_of_every_layer(checkpoint: Path, tmp_path: Path) -> None:
    run(tmp_path / "out", checkpoint, parameters(rounding="gptq", symmetric=True))
    overlay = Overlay.load(tmp_path / "out")
    assert overlay.rounded is not None
    assert set(overlay.rounded.tensors) == {
        f"model.layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in LINEAR_LAYERS
    }
    OverlaidCheckpoint(Checkpoint(checkpoint), overlay, clip=True)


@pytest.mark.parametrize(("rounding", "compute"), [("nearest", "fp32"), ("gptq", "bf16")])
def test_threads_do_not_change_the_bytes(
    checkpoint: Path, tmp_path: Path, rounding: str, compute: str
) -> None:
    params = parameters(rounding=rounding, calibration={"compute": compute})
    for threads in (1, 2):
        run(tmp_path / str(threads), checkpoint, params, threads=threads)
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2")


@pytest.mark.parametrize(
    "where",
    [
        "layer 1",
        "search model.layers.1.mlp.down_proj.weight",
        "search model.layers.2.mlp.gate_up_proj.weight",
    ],
)
def test_goes_on_from_the_layer_where_it_was_stopped(
    checkpoint: Path, tmp_path: Path, where: str
) -> None:
    params, unfinished = parameters(rounding="gptq"), tmp_path / "unfinished"
    run(tmp_path / "whole", checkpoint, params)
    with pytest.raises(Interruption):
        run(tmp_path / "a", checkpoint, params, progress=Fragile(where), unfinished=unfinished)
    layer = int(where.split()[-1].removeprefix("model.layers.").split(".")[0])
    assert (unfinished / f"stream-{layer:04d}.npy").is_file()
    assert len(list(unfinished.glob("stream-*"))) == 1
    watched = Fragile("never")
    run(tmp_path / "b", checkpoint, params, progress=watched, unfinished=unfinished)
    assert watched.notes == [f"went on from layer {layer}"]
    assert watched.seen[0] == f"layer {layer - 1}"
    assert f"search model.layers.{layer - 1}.mlp.down_proj.weight" not in watched.seen
    assert watched.done == watched.total
    assert files_in(tmp_path / "b") == files_in(tmp_path / "whole")


def test_what_a_kill_left_half_written_is_not_used(checkpoint: Path, tmp_path: Path) -> None:
    params, unfinished = parameters(), tmp_path / "unfinished"
    run(tmp_path / "whole", checkpoint, params)
    with pytest.raises(Interruption):
        run(tmp_path / "a", checkpoint, params, progress=Fragile("layer 1"), unfinished=unfinished)
    # killed between the rename of a layer and that of the stream behind it, while writing that
    (unfinished / "layer-0001").mkdir()
    (unfinished / "stream.partial").write_bytes(b"half")
    (unfinished / "partial").mkdir()
    (unfinished / "partial" / "overlay.json").write_text("{")
    run(tmp_path / "b", checkpoint, params, unfinished=unfinished)
    assert files_in(tmp_path / "b") == files_in(tmp_path / "whole")


def test_a_layer_that_is_gone_is_done_again(checkpoint: Path, tmp_path: Path) -> None:
    params, unfinished = parameters(), tmp_path / "unfinished"
    with pytest.raises(Interruption):
        run(tmp_path / "a", checkpoint, params, progress=Fragile("layer 2"), unfinished=unfinished)
    shutil.rmtree(unfinished / "layer-0000")
    watched = Fragile("never")
    run(tmp_path / "b", checkpoint, params, progress=watched, unfinished=unfinished)
    assert watched.notes == []
    assert "layer 0" in watched.seen


RECIPE = """\
schema: 1
name: overlay
model: {{source: {model}}}
stages:
  - id: awq
    uses: awq
    with: {{group_size: 32, calibration: {{windows: 8, window_length: 64}}}}
"""


def start(recipe: Path, home: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "phiconv",
            "build",
            str(recipe),
            "--out",
            str(out),
            "--threads",
            "1",
        ],
        cwd=ROOT,
        env={**os.environ, "PHICONV_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    recipe = tmp_path / "overlay.yaml"
    recipe.write_text(RECIPE.format(model=ROOT / "examples" / "tiny-phi3"), encoding="utf-8")
    unfinished = Workspace(tmp_path / "killed").unfinished
    process = start(recipe, tmp_path / "killed", tmp_path / "out")
    while not list(unfinished.glob("*/layer-0001")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert len(list(unfinished.iterdir())) == 1
    for home in ("killed", "whole"):
        process = start(recipe, tmp_path / home, tmp_path / home / "out")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert ("went on from layer" in errors) == (home == "killed")
    manifests = [
        json.loads((tmp_path / home / "out" / "manifest.json").read_text(encoding="utf-8"))
        for home in ("killed", "whole")
    ]
    assert manifests[0]["artifact"] == manifests[1]["artifact"]
    assert list(unfinished.iterdir()) == []


def poisoned(checkpoint: Path, folder: Path, tensor: str, value: float) -> Path:
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor].reshape(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "self_attn.qkv_proj",
            np.nan,
            r"into model\.layers\.1\.self_attn\.o_proj is not finite, because "
            r"model\.layers\.1\.self_attn\.qkv_proj\.weight holds NaN or Inf",
        ),
        (
            "mlp.down_proj",
            np.inf,
            r"out of model\.layers\.1 is not finite, because model\.layers\.1\.mlp\.down_proj",
        ),
        (
            "input_layernorm",
            1e38,
            r"into model\.layers\.1\.\S+ is not finite, although the layer's weights are",
        ),
    ],
)
def test_what_is_not_finite_is_named_at_once(
    checkpoint: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    broken = poisoned(checkpoint, tmp_path / "model", f"model.layers.1.{name}.weight", value)
    progress = Fragile("layer 2")
    with pytest.raises(StageError, match=message):
        run(tmp_path / "out", broken, parameters(), progress=progress)
    assert "layer 0" in progress.seen


def test_parameters_that_cannot_work_are_found_before_any_work(checkpoint: Path) -> None:
    config = Checkpoint(checkpoint).config
    assert Awq().check(parameters(), config) == []
    (error,) = Awq().check(parameters(group_size=256), config)[:1]
    assert "hidden_size 128 is not a multiple of group_size 256" in error.message
    long = parameters(calibration={"window_length": 100_000})
    assert "exceeds the model's context" in Awq().check(long, config)[0].message


def test_defaults_follow_the_rounding_and_the_backend() -> None:
    chosen = [
        AwqParams.model_validate(given)
        for given in ({}, {"rounding": "nearest"}, {"backend": "autoawq"}, {"search": "none"})
    ]
    assert [(one.rounding, one.search) for one in chosen] == [
        ("gptq", "mse"),
        ("nearest", "none"),
        ("nearest", "none"),
        ("gptq", "none"),
    ]


def test_keys_follow_texts_and_settings_but_not_paths(tmp_path: Path) -> None:
    keys = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("the same text")
        keys.append(Awq().key_params(parameters(calibration={"tokens": str(tmp_path / name)})))
    assert keys[0] == keys[1]
    (tmp_path / "b.txt").write_text("another text")
    changed = [
        parameters(calibration={"tokens": str(tmp_path / "b.txt")}),
        parameters(calibration={"tokens": str(tmp_path / "a.txt"), "gram_tokens": 100}),
        parameters(calibration={"tokens": str(tmp_path / "a.txt")}, rounding="gptq"),
    ]
    texts = {json.dumps(Awq().key_params(params), sort_keys=True) for params in changed}
    assert len(texts | {json.dumps(keys[0], sort_keys=True)}) == 4


def test_the_estimate_covers_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    params = parameters(rounding="gptq")
    config = Checkpoint(checkpoint).config
    run(tmp_path / "out", checkpoint, params)
    written = sum(len(data) for data in files_in(tmp_path / "out").values())
    estimate = Awq().estimate(params, config, ())
    assert written < estimate.disk_bytes < 5 * written
    assert estimate.ram_bytes > 500 << 20
