"""From a loaded model to its fused step, or to the reason why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from awq.engine.fused.discover import discover
from awq.engine.fused.merged import Weights, merge_linears
from awq.engine.fused.plan import Layer, Plan
from awq.engine.fused.step import FusedStep
from awq.engine.fused.wide import WideStep
from awq.engine.head import Int8Head
from awq.kernels.cuda.layout import TILE_ROWS, gpu
from awq.kernels.cuda.step.attention import HEAD_DIMS
from awq.kernels.cuda.step.ends import MAX_ROWS
from awq.kernels.cuda.step.gemv import fits, units_at_once
from awq.kernels.cuda.step.launch import OLDEST
from awq.linear import QuantLinear

_HEAD_PART, _HEAD_BYTES = 256, 34 << 10  # channels that the head takes at a time; its shared memory beside the rows
_HALF = (torch.float16, torch.bfloat16)


def fused_step(model: Any) -> FusedStep | WideStep | str:
    """The fused step of a quantized decoder on a GPU, or in a few words why there is none.

    The linears that read one input are put together: their buffers become views of one. Few rows go through the GEMV,
    more through the GEMM, and where one version is pinned all that it takes.
    """
    device: torch.device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device.type}"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    with torch.cuda.device(device), torch.inference_mode(False):
        plan = discover(model)
        reason = plan if isinstance(plan, str) else obstacle(plan, device)
        if isinstance(plan, str) or reason:
            return str(reason)
        weights = []
        for layer in plan.layers:
            merged = _merge(layer)
            if isinstance(merged, str):
                return merged
            weights.append(merged)
        torch.cuda.empty_cache()  # what the linears had each for itself
        wide, versions = WideStep(plan, weights), _versions(plan)
        rows = 0 if "GEMM" in versions else most_rows(plan, weights, device.index or 0)
        if "GEMV" not in versions:
            return FusedStep(plan, weights, rows, wide) if rows else wide
        return FusedStep(plan, weights, rows) if rows else "a row does not fit into the shared memory of this GPU"


def most_rows(plan: Plan, weights: Sequence[Weights], device: int) -> int:
    """How many rows every kernel takes at once: what it reads of all must fit into shared memory. 0: not even one."""
    normed = [each.units for layer in weights for each in (layer.qkv, layer.gate_up)]
    added = [each.units for layer in weights for each in (layer.output, layer.down)]
    memory, of_head = gpu(device).shared_memory, 2 * (-(-plan.embedding.shape[1] // _HEAD_PART) * _HEAD_PART + 8)

    def fit(rows: int) -> bool:
        return (
            (rows == 1 or rows * of_head + _HEAD_BYTES <= memory)
            and all(fits(each, device, rows) for each in normed)
            and all(units_at_once(each, device, rows) for each in added)
        )

    return next((rows for rows in range(MAX_ROWS, 0, -1) if fit(rows)), 0) if fit(1) else 0


def obstacle(plan: Plan, device: torch.device) -> str | None:
    """What in a plan the kernels do not take."""
    linears = [linear for layer in plan.layers for linear in _linears(layer)]
    if not all(isinstance(linear, QuantLinear) for linear in linears):
        return "some of its layers are not quantized"
    quantized = [linear for linear in linears if isinstance(linear, QuantLinear)]
    if any(linear.device != device for linear in quantized):
        return "it lies on several devices"
    if len(_versions(plan)) > 1:
        return "its layers are pinned to several versions"
    if any(linear.spec.dtype != plan.embedding.dtype for linear in quantized):
        return "its activations have several dtypes"
    if {plan.embedding.dtype, getattr(plan.head, "weight", plan.embedding).dtype} - set(_HALF):
        return "its head or its embedding is not in half precision"
    if isinstance(plan.head, Int8Head) and plan.head.in_features % 16:
        return "its int8 head has a width that 16 does not divide"
    if any(layer.attention.head_dim not in HEAD_DIMS for layer in plan.layers):
        return f"its heads are not of 8 to {HEAD_DIMS[-1]} channels, a multiple of 8"
    if any(linear.in_features % 8 for linear in quantized):
        return "it has a width that 8 does not divide"
    if any(layer.down.in_features % TILE_ROWS for layer in plan.layers if isinstance(layer.down, QuantLinear)):
        return f"its MLP has a width that {TILE_ROWS} does not divide"
    return None


def _versions(plan: Plan) -> set[str | None]:
    """What is pinned: "GEMM", "GEMV", or None where each call chooses."""
    linears = (linear for layer in plan.layers for linear in _linears(layer))
    return {linear.choice.version for linear in linears if isinstance(linear, QuantLinear)}


def _linears(layer: Layer) -> tuple[nn.Module, ...]:
    return (*layer.qkv, layer.output, *layer.gate_up, layer.down)


def _merge(layer: Layer) -> Weights | str:
    merged = []
    for linears in (layer.qkv, (layer.output,), layer.gate_up, (layer.down,)):
        found = merge_linears([linear for linear in linears if isinstance(linear, QuantLinear)])
        if isinstance(found, str):
            return found
        merged.append(found)
    return Weights(*merged)
