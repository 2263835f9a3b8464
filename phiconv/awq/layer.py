"""Everything that is searched for one decoder layer, on the statistics of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from phiconv.awq.clip import search_clips
from phiconv.awq.gptq import Codes, Gptq, GramFactor, PackedCodes
from phiconv.awq.groups import GROUPS, FoldingGroup, query_key_rows
from phiconv.awq.rounding import Folded, Nearest, Search
from phiconv.awq.scales import Scaling, relative_magnitudes, sampled_rows, search_scales
from phiconv.awq.statistics import InputStatistics
from phiconv.checkpoint.overlay import GroupRecord, Rounding
from phiconv.checkpoint.weight_source import Grid

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint, ModelConfig

# Rows on which candidates are judged: enough that the best of twenty is seldom another, measured
# on tiny-phi3 and on layers of Phi-3-mini's size.
_SEARCH_ROWS = 512
# GPTQ makes up for most of what scales gain on weights without outliers; what little they still
# gain on the calibration tokens is lost again on others (3 % of the KL divergence on a trained
# grouped-query model). With outliers they gain several times as much.
_LEAST_GAIN_GPTQ = 0.03


@dataclass(frozen=True)
class Settings:
    """How a layer is searched.

    Attributes:
        grid: What weights are rounded to.
        rounding: How they are rounded.
        search: How a group's scale on the grid is chosen.
        scale: Whether input channels are scaled.
        clip: Whether groups are clipped.
        damping: Share of the Gram matrix's diagonal that GPTQ adds to it.
        threads: How many threads to use; does not change the result.
    """

    grid: Grid
    rounding: Rounding
    search: Search
    scale: bool
    clip: bool
    damping: float
    threads: int


@dataclass(frozen=True)
class LayerResult:
    """What was found for a layer, by checkpoint tensor, as an overlay holds it.

    Attributes:
        columns: Factors of columns.
        rows: Factors of rows.
        clips: Clip indices.
        codes: What GPTQ rounded.
        records: One for each group.
    """

    columns: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    rows: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    clips: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    codes: dict[str, PackedCodes] = field(default_factory=dict)
    records: list[GroupRecord] = field(default_factory=list)


def search_layer(
    checkpoint: Checkpoint,
    layer: int,
    statistics: Mapping[str, Callable[[], InputStatistics]],
    settings: Settings,
    done: Callable[[str], None] = lambda _: None,
) -> LayerResult:
    """Searches scales, clips and codes for the weights of a layer.

    Groups whose inverse scales go to rows of another weight come first, so that this weight is
    rounded with them.

    Args:
        checkpoint: The checkpoint.
        layer: Index of the layer.
        statistics: Statistics of the inputs, by the checkpoint's name of the weight; each is asked
            for once, and dropped before the next.
        settings: How.
        done: Called with the name of each weight that is done.
    """
    result = LayerResult()
    for group in sorted(GROUPS, key=lambda group: group.source.endswith("layernorm")):
        name = group.weight(layer)
        _search_weight(checkpoint, group, layer, statistics[name](), settings, result)
        done(name)
    order = [group.name for group in GROUPS]
    result.records.sort(key=lambda record: order.index(record.group))
    return result


def _search_weight(
    checkpoint: Checkpoint,
    group: FoldingGroup,
    layer: int,
    statistics: InputStatistics,
    settings: Settings,
    result: LayerResult,
) -> None:
    name, source = group.weight(layer), group.source_weight(layer)
    stored = checkpoint.read(name)
    rows = result.rows.get(name, np.ones(len(stored), np.float32))
    trial = _Trial.of(stored, rows, statistics, settings, name)
    found = _scaling(trial, group, checkpoint.config)
    if found.ratio is not None:
        inverse = result.rows.setdefault(
            source, np.ones(checkpoint.tensors[source].shape[0], np.float32)
        )
        inverse[group.source_rows(checkpoint.config)] = group.rows(found.columns, checkpoint.config)
        result.columns[name] = found.columns
    scaled_loss = trial.nearest_loss(found.columns)
    record = GroupRecord(
        layer,
        group.name,
        (name,),
        loss_rtn=trial.relative(trial.nearest_loss(np.ones_like(found.columns))),
        loss_scaled=trial.relative(scaled_loss),
        ratio=found.ratio,
        scaled=found.ratio is not None,
    )
    folded = Folded(stored, found.columns, rows)
    if trial.factor is not None:
        codes = trial.gptq.round(folded, trial.factor)
        result.codes[name] = codes.packed(settings.grid)
        record = replace(record, loss_gptq=trial.relative(trial.codes_loss(codes, found.columns)))
    elif settings.clip:
        clips = search_clips(folded, statistics.gram, trial.nearest)
        if group.name == "qkv":  # attention takes the product of queries and keys: not a sum
            clips[: query_key_rows(checkpoint.config)] = 0
        loss = trial.nearest_loss(found.columns, clips)
        record = replace(record, loss_clipped=trial.relative(loss))
        if loss < scaled_loss:
            result.clips[name] = clips
    result.records.append(record)


def _scaling(trial: _Trial, group: FoldingGroup, config: ModelConfig) -> Scaling:
    """The scales with which the rounding that will be used loses least."""
    loss = trial.gptq_loss if trial.factor is not None else trial.nearest_loss
    if not trial.settings.scale:
        ones = np.ones(trial.stored.shape[1], np.float32)
        return Scaling(ones, None, loss(ones))
    values = trial.stored.astype(np.float32)
    relative = relative_magnitudes(values, trial.settings.grid.group_size)
    least_gain = _LEAST_GAIN_GPTQ if trial.factor is not None else 0.0
    return search_scales(group, config, trial.statistics.mean_abs, relative, loss, least_gain)


@dataclass(frozen=True)
class _Trial:
    """A weight on trial: what is lost by rounding it, judged on a sample of its rows.

    Attributes:
        stored: The whole weight as stored, [N, K].
        rows: Its rows' factors, [N].
        sample: The indices of the rows that losses are taken on.
        statistics: Of its inputs.
        settings: How it is searched.
        factor: Of the Gram matrix, where it is rounded by GPTQ.
        energy: What the sampled rows' output has, to which losses are relative.
    """

    stored: NDArray[Any]
    rows: NDArray[np.float32]
    sample: NDArray[np.int64]
    statistics: InputStatistics
    settings: Settings
    factor: GramFactor | None
    energy: float

    @classmethod
    def of(
        cls,
        stored: NDArray[Any],
        rows: NDArray[np.float32],
        statistics: InputStatistics,
        settings: Settings,
        name: str,
    ) -> _Trial:
        factor = None
        if settings.rounding == "gptq":
            factor = GramFactor.of(
                statistics.gram, settings.damping, settings.grid.group_size, name
            )
        sample = sampled_rows(len(stored), _SEARCH_ROWS)
        energy = _output_energy(stored[sample].astype(np.float32), statistics.gram)
        return cls(stored, rows, sample, statistics, settings, factor, energy)

    @property
    def nearest(self) -> Nearest:
        return Nearest(self.settings.grid, self.settings.search, self.settings.threads)

    @property
    def gptq(self) -> Gptq:
        return Gptq(self.settings.grid, self.settings.search, self.settings.threads)

    def relative(self, loss: float) -> float:
        """A loss as a share of the output; 0 of an output that is always 0."""
        return loss / self.energy if self.energy else 0.0

    def nearest_loss(
        self, columns: NDArray[np.float32], clips: NDArray[np.uint8] | None = None
    ) -> float:
        """What rounding to the nearest loses, with these factors."""
        part = None if clips is None else clips[self.sample]
        errors = self.nearest.errors(self._sampled(columns), part)
        return _output_energy(errors, self.statistics.gram)

    def gptq_loss(self, columns: NDArray[np.float32]) -> float:
        """What GPTQ loses, with these factors, by its damped Gram matrix."""
        assert self.factor is not None
        return self.gptq.round(self._sampled(columns), self.factor).loss

    def codes_loss(self, codes: Codes, columns: NDArray[np.float32]) -> float:
        """What codes of the whole weight lose."""
        stored, rows = self.stored[self.sample], self.rows[self.sample]
        errors = codes.weights(self.sample, self.settings.grid.group_size)
        errors /= columns
        errors /= rows[:, None]
        errors -= stored.astype(np.float32)
        return _output_energy(errors, self.statistics.gram)

    def _sampled(self, columns: NDArray[np.float32]) -> Folded:
        return Folded(self.stored[self.sample], columns, self.rows[self.sample])


def _output_energy(weight: NDArray[np.float32], gram: torch.Tensor) -> float:
    """`tr(W H W^T)`: the mean square of a weight's outputs, summed over its rows."""
    import torch

    products: NDArray[np.float32] = (torch.from_numpy(weight) @ gram).numpy()
    products *= weight
    # not torch's sum, whose order depends on the number of threads
    return float(products.sum(dtype=np.float64))
