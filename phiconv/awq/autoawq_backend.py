"""The package AutoAWQ as another engine of the stage awq: its search, phiconv's overlay.

The only module that touches `awq`, which is deprecated and is kept working here:

- on a CPU `_compute_best_scale` keeps references where it means copies, so that every trial of a
  scale corrupts the weight; `_recording` gives it copies;
- texts longer than its window it drops without a word; here it is given windows of token ids;
- grouped-query models it corrupts; the stage refuses them before;
- remote code, which it allows by default, is off, and nothing is read from a hub.

It searches with the model in fp32 in memory, all of it, and clips query and key rows too.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from phiconv.awq.groups import GROUPS
from phiconv.awq.layer import LayerResult
from phiconv.checkpoint.overlay import GroupRecord
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.kernels.overlay import CLIP_STEPS, MAX_CLIP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.checkpoint.weight_source import Grid

# Tokens that run through a module at once, where no mask of all windows is in the way.
_BATCH_TOKENS = 4096


def search_with_autoawq(
    checkpoint: Checkpoint,
    windows: NDArray[np.int64],
    grid: Grid,
    *,
    clip: bool,
    threads: int,
    advance: Callable[[int, str], None],
) -> LayerResult:
    """Runs AutoAWQ's scale and clip search over the whole model.

    Args:
        checkpoint: The checkpoint, of a model without grouped queries.
        windows: Token ids, [n, T].
        grid: What weights are rounded to, 4 bits; a symmetric one by AutoAWQ's own rule, whose
            largest code is 7.
        clip: Whether groups are clipped.
        threads: How many threads PyTorch uses.
        advance: Called with the tokens of each layer that is begun, and its name.

    Returns:
        Scales and clip indices of all layers.

    Raises:
        EnvironmentLacksError: AutoAWQ or what it needs cannot be imported.
        StageError: AutoAWQ failed.
    """
    import torch

    scales: list[tuple[int, str, Any]] = []
    limits: dict[str, NDArray[np.uint8]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _quiet():
            auto, quantizer = _import(scales, limits, advance, windows.size)
            model = auto.from_pretrained(
                str(checkpoint.path),
                torch_dtype=torch.float32,
                trust_remote_code=False,
                safetensors=True,
                device_map="cpu",
            )
            model.quantize(
                None,
                {
                    "zero_point": not grid.symmetric,
                    "q_group_size": grid.group_size,
                    "w_bit": grid.bits,
                    "version": "GEMM",
                },
                calib_data=windows.tolist(),
                max_calib_samples=len(windows),
                max_calib_seq_len=windows.shape[1],
                n_parallel_calib_samples=_parallel(checkpoint, windows.shape[1]),
                apply_clip=clip,
                export_compatible=True,  # scales and limits, no packing
                quantizer_cls=quantizer,
            )
    # AutoAWQ asserts and raises bare exceptions.
    except (AssertionError, RuntimeError, ValueError, TypeError, AttributeError, OSError) as error:
        raise StageError(
            f"AutoAWQ failed: {type(error).__name__}: {error}",
            where="awq: backend",
            remedy="use backend: phiconv",
        ) from error
    finally:
        torch.set_num_threads(before)
    return _result(checkpoint, scales, limits)


def _import(
    scales: list[tuple[int, str, Any]],
    limits: dict[str, NDArray[np.uint8]],
    advance: Callable[[int, str], None],
    tokens: int,
) -> tuple[Any, type]:
    """AutoAWQ's model class, and a quantizer that records what it finds."""
    try:
        from awq import AutoAWQForCausalLM
        from awq.quantize.quantizer import AwqQuantizer
    except ImportError as error:
        raise EnvironmentLacksError(
            f"AutoAWQ cannot be imported: {error}",
            where="awq: backend",
            remedy="install what docs/interoperability.md says, or use backend: phiconv",
        ) from error
    quantizer: Any = AwqQuantizer

    class RecordingQuantizer(quantizer):  # type: ignore[misc]
        def _index(self, module: Any) -> int:
            return next(i for i, other in enumerate(self.modules) if other is module)

        def _get_input_feat(self, layer: Any, named_linears: Any) -> Any:
            advance(tokens, f"layer {self._index(layer)}")
            return super()._get_input_feat(layer, named_linears)

        def _search_best_scale(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._search_best_scale(module, *args, **kwargs)
            _, (linear,), values = found
            scales.append((self._index(module), linear, values.clone()))
            return found

        def _compute_best_scale(
            self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *args: Any, **kwargs: Any
        ) -> Any:
            kept = module2inspect.state_dict
            # what it calls a backup is the weights themselves, on a CPU
            module2inspect.state_dict = lambda: {k: v.clone() for k, v in kept().items()}
            try:
                return super()._compute_best_scale(
                    x, w_mean, x_mean, module2inspect, *args, **kwargs
                )
            finally:
                del module2inspect.state_dict

        def _search_best_clip(self, layer: Any, named_linears: Any, input_feat: Any) -> Any:
            found = super()._search_best_clip(layer, named_linears, input_feat)
            prefix = f"model.layers.{self._index(layer)}"
            for name, largest in found:
                weight = named_linears[name].weight.detach()
                limits[f"{prefix}.{name}.weight"] = _clip_indices(weight, largest)
            return found

    return AutoAWQForCausalLM, RecordingQuantizer


def _clip_indices(weight: Any, largest: Any) -> NDArray[np.uint8]:
    """AutoAWQ's limits [N, groups, 1] of a scaled weight [N, K], as places on its own grid."""
    import torch

    groups = weight.view(weight.shape[0], largest.shape[1], -1).abs().amax(dim=2)
    share = torch.where(groups > 0, largest.squeeze(2) / groups, 1.0)
    indices = torch.round((1 - share) * CLIP_STEPS).clamp(0, MAX_CLIP)
    result: NDArray[np.uint8] = indices.to(torch.uint8).cpu().numpy()
    return result


def _parallel(checkpoint: Checkpoint, length: int) -> int | None:
    """How many windows AutoAWQ runs at once: all, where a mask is made for all."""
    window = checkpoint.config.sliding_window
    if window is not None and window < length:
        return None
    return max(1, _BATCH_TOKENS // length)


def _result(
    checkpoint: Checkpoint,
    scales: list[tuple[int, str, Any]],
    limits: dict[str, NDArray[np.uint8]],
) -> LayerResult:
    result = LayerResult()
    by_linear = {group.linear: group for group in GROUPS}
    for layer, linear, values in scales:
        group = by_linear[linear]
        columns: NDArray[np.float32] = values.float().numpy().reshape(-1)
        name, source = group.weight(layer), group.source_weight(layer)
        ones = np.ones(checkpoint.tensors[source].shape[0], np.float32)
        inverse = result.rows.setdefault(source, ones)
        inverse[group.source_rows(checkpoint.config)] = group.rows(columns, checkpoint.config)
        result.columns[name] = columns
        result.records.append(GroupRecord(layer, group.name, (name,), scaled=True))
    result.clips.update({name: indices for name, indices in limits.items() if indices.any()})
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps progress bars and the notice of deprecation off the terminal."""
    output = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        warnings.simplefilter("ignore")
        yield
