"""The loop over a model's blocks: capture -> scale -> clip -> round -> outliers -> pack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from awq.algorithm.affine import Affine, fit_affine
from awq.algorithm.capture import Chunk, InputStats, capture, enter_model, fast_matmul, lifted
from awq.algorithm.clip import search_clip
from awq.algorithm.groups import ScaleGroup, Structure, find_structure, fold
from awq.algorithm.loss import output_error
from awq.algorithm.outliers import choose_channels, outlier_count, residual
from awq.algorithm.refit import refit_scales
from awq.algorithm.scale import search_scale
from awq.config import QuantConfig
from awq.errors import UnsupportedModelError
from awq.linears import linear_shape
from awq.packing import Outliers, PackedInt4, pack

PROBE_TOKENS = 32


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear's result; `report` says how it came about, losses relative to the linear's own output power."""

    packed: PackedInt4
    outliers: Outliers | None
    bias: Tensor | None
    report: dict[str, Any]

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            packed=self.packed.to(device),
            outliers=self.outliers and self.outliers.to(device),
            bias=None if self.bias is None else self.bias.to(device),
        )


class _Linear:
    """A linear on its way through the steps: its float32 weight is the module's own, changed in place by folds."""

    def __init__(self, module: nn.Linear, stats: InputStats | None, config: QuantConfig) -> None:
        self.module = module
        self.stats = stats = stats or InputStats.empty(module.in_features, module.weight.device)
        self.row_scale = torch.ones(module.out_features, device=module.weight.device)
        self.usable = stats.tokens > 0 and stats.finite
        self.scaled_by: str | None = None
        self.power = 1.0
        self.power = self.loss(self.weight) or 1.0
        self.loss_rounding = self.loss(_plain(self.weight, config) - self.weight)

    @property
    def weight(self) -> Tensor:
        return self.module.weight.data

    def loss(self, delta: Tensor) -> float:
        """Output error relative to the output's power, as the unscaled model would see it."""
        with fast_matmul():
            return float(output_error(delta * self.row_scale.unsqueeze(1), self.stats.gram)) / self.power


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of blocks that holds most of the model's linear weights, and its name."""

    def weights(blocks: nn.ModuleList) -> int:
        return sum(math.prod(linear_shape(module) or (0,)) for module in blocks.modules())

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = max(lists, key=lambda item: weights(item[1]), default=None)
    if found is None or not weights(found[1]):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks with linear layers, so there is nothing to quantize."
        )
    return found


def quantize_blocks(
    model: nn.Module, tokens: Tensor, config: QuantConfig, wanted: Callable[[str], bool], device: torch.device
) -> Iterator[tuple[str, dict[str, QuantizedLinear]]]:
    """Quantize block after block; yields the block's name and its results by full linear name.

    tokens: int64 [sequences, seq_len]. Norms and biases are changed in place as scales are folded; the linears keep
    their (scaled) float weights, for the caller to replace. `wanted(name)` says which linears to quantize; the others
    are scaled with their group and stay float.
    """
    prefix, blocks = find_blocks(model)
    with torch.no_grad():
        probe = enter_model(model, blocks, tokens[:1, :PROBE_TOKENS], device)[0]
        chunks = enter_model(model, blocks, tokens, device)
        for index, block in enumerate(blocks):
            name = f"{prefix}.{index}"
            origin = next(block.parameters()).device
            stored_in = storage_dtype(block)
            with lifted(block, device):
                structure, stats = _look(block, index, chunks, probe)
                linears = {
                    linear: _Linear(module, stats.get(linear), config)
                    for linear, module in block.named_modules()
                    if isinstance(module, nn.Linear) and wanted(f"{name}.{linear}")
                }
                results = _quantize_block(block, structure, linears, config, stored_in)
            yield name, {f"{name}.{linear}": result.to(origin) for linear, result in results.items()}


def _look(block: nn.Module, index: int, chunks: list[Chunk], probe: Chunk) -> tuple[Structure, dict[str, InputStats]]:
    """The block's structure, and its inputs' statistics; the chunks move on to its output."""
    probe.hidden = chunks[0].hidden[:1, : probe.hidden.shape[1]].clone()
    with fast_matmul(enabled=False):
        structure = find_structure(block, lambda: probe.calls[index].run(block, probe.hidden))
    with fast_matmul():
        return structure, capture(block, index, chunks, structure.input_sets)


def storage_dtype(block: nn.Module) -> torch.dtype:
    """What the block's norms are stored in: their own half precision, float16 for a float32 model."""
    dtype = next(block.parameters()).dtype
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16


def _quantize_block(
    block: nn.Module,
    structure: Structure,
    linears: dict[str, _Linear],
    config: QuantConfig,
    stored_in: torch.dtype,
) -> dict[str, QuantizedLinear]:
    if config.scale:
        for group in structure.groups:
            _scale_group(block, group, linears, config, stored_in)
    results: dict[str, QuantizedLinear] = {}
    reached = {name for names in structure.input_sets for name in names}
    unreached = tuple((name,) for name in linears if name not in reached)
    for names in (*structure.input_sets, *unreached):
        if wanted := {name: linears[name] for name in names if name in linears}:
            results |= _round(wanted, config)
    return results


def _scale_group(
    block: nn.Module, group: ScaleGroup, linears: dict[str, _Linear], config: QuantConfig, stored_in: torch.dtype
) -> None:
    consumers = [linears[name] for name in group.consumers if name in linears]
    if not consumers or not all(consumer.usable for consumer in consumers):
        return
    weights = [consumer.weight for consumer in consumers]
    scale = search_scale(weights, consumers[0].stats, lambda w: _plain(w, config), group.reduce, group.expand)
    if scale is None:
        return
    applied = fold(block, group, scale, stored_in)
    stats = consumers[0].stats.rescaled(applied)
    for consumer in consumers:
        consumer.stats, consumer.scaled_by = stats, group.producer
    if group.producer in linears:
        group.rows(linears[group.producer].row_scale).mul_(scale.view(group.parts, -1))


def _round(linears: dict[str, _Linear], config: QuantConfig) -> dict[str, QuantizedLinear]:
    """Codes and outlier channels of the linears that read one input."""
    coded = {name: _codes(linear, config) for name, linear in linears.items()}
    deltas = {name: grid.decode(codes) - linears[name].weight for name, (grid, codes) in coded.items()}
    kept = _outliers(linears, deltas, config)
    return {
        name: _result(linear, *coded[name], deltas[name], kept.get(name), config) for name, linear in linears.items()
    }


def _codes(linear: _Linear, config: QuantConfig) -> tuple[Affine, Tensor]:
    """The grid, and the codes on it, that the steps before the outliers arrive at."""
    group_size = config.group_size or -1
    if config.clip and linear.usable:
        grid = search_clip(linear.weight, linear.stats.gram, group_size, config.bits, config.zero_point)
    else:
        grid = fit_affine(linear.weight, group_size, config.bits, config.zero_point)
    codes = grid.encode(linear.weight)
    if config.refit and linear.usable:
        grid = refit_scales(linear.weight, codes, grid, linear.stats.gram)
    return grid, codes


def _outliers(linears: dict[str, _Linear], deltas: dict[str, Tensor], config: QuantConfig) -> dict[str, Outliers]:
    """The channels kept in fp16, the same for all the linears that read them."""
    if config.outlier_ratio == 0 or not all(linear.usable for linear in linears.values()):
        return {}
    first = next(iter(linears.values()))
    count = outlier_count(first.module.in_features, config.outlier_ratio)
    channels = choose_channels(list(deltas.values()), first.stats.gram, count)
    index = channels.to(torch.int32)
    return {name: Outliers(index, residual(delta, channels, first.stats.gram)) for name, delta in deltas.items()}


def _result(
    linear: _Linear, grid: Affine, codes: Tensor, delta: Tensor, outliers: Outliers | None, config: QuantConfig
) -> QuantizedLinear:
    report = {
        "bits": config.bits,
        "group_size": config.group_size,
        "scaled_by": linear.scaled_by,
        "loss_rounding": linear.loss_rounding,
        "loss": linear.loss(delta),
        "loss_with_outliers": linear.loss(outliers.add_to(delta) if outliers else delta),
        "outliers": outliers.index.numel() if outliers else 0,
        "fallback": _fallback(linear),
    }
    bias = dict(linear.module.named_parameters()).get("bias")
    stored_bias = None if bias is None else bias.data.to(torch.float16)
    return QuantizedLinear(pack(codes, grid.zeros, grid.scales), outliers, stored_bias, report)


def _fallback(linear: _Linear) -> str | None:
    if linear.usable:
        return None
    return "activations are not finite" if linear.stats.tokens else "no calibration token reached it"


def _plain(weight: Tensor, config: QuantConfig) -> Tensor:
    """`weight` after plain rounding."""
    return fit_affine(weight, config.group_size or -1, config.bits, config.zero_point).round(weight)
