"""torch's int4 CPU operator for a few rows; for many, its packed bytes dequantized to bf16 and one product.

Both compute in bf16, the only dtype in which the operator is fast, with W = (q - 8) * scale + zero, where scale is
rounded to bf16 and so is zero = (8 - z) * scale. Next to the rounding to 4 bits both errors are small, but not next to
nothing: where 8 - z is 3, 5, 6 or 7, a zero weight may become 1/70 of a step. Outlier channels, whose x is huge, take
that error back in their residual.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from awq.hardware import Device
from awq.kernels.base import LinearSpec, RowKernel, Weights
from awq.packing import Outliers, PackedInt4

_HOW = {"GEMV": "torch's int4 CPU kernel, in bf16", "GEMM": "dequantizing to bf16, then one product"}
_GROUP_SIZES = (256, 128, 64, 32)  # that the operator takes
# Output channels that the operator interleaves, by vector width: 64 with AVX-512, 32 with AVX2. In a block of B
# channels, byte j of input channel k holds channel j in its low nibble and channel B/2 + j in its high one.
_BLOCKS = (64, 32)
_PADDED = 64  # out_features are padded to a multiple of this, so that every block is full
_CHUNK = 1 << 20  # weights dequantized at a time: about what the second-level cache holds


class CpuInt4(RowKernel):
    name = "cpu"
    versions = _HOW

    def gemv_rows(self, spec: LinearSpec, device: Device | torch.device, weights: Weights | None = None) -> int:
        """Where dequantizing pays: measured on the linears of a 135M model, one core, with AVX-512 and AVX2."""
        return 48 if _block() == 64 else 24

    def rejects(self, spec: LinearSpec, device: Device) -> str | None:
        if device.kind != "cpu":
            return f"it runs on the CPU, not on {device.kind}"
        if _fit_group(spec.group_size) is None:
            return f"torch's int4 CPU kernel takes groups of 32 to 256, into which {spec.group_size} does not split"
        if not _block():
            return f"torch {torch.__version__} has no fast int4 kernel for this {device}"
        return None

    def prepare(
        self,
        packed: PackedInt4,
        outliers: Outliers | None,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Tensor]:
        codes, (scales, zeros) = packed.codes(), _affine(packed)
        weights = {
            "cpu_codes": torch._convert_weight_to_int4pack_for_cpu(_pad(codes.to(torch.int32), 0), 1),
            "cpu_scales_and_zeros": torch.stack([_pad(scales, 1), _pad(zeros, 1)], dim=-1),
        }
        if outliers is not None:
            index = outliers.index.long()
            lost = _lost(packed, codes, scales, zeros, index)
            weights |= {"cpu_index": index, "cpu_residual": outliers.residual.float() + lost}
        return weights

    def multiply(self, x: Tensor, weights: Weights, spec: LinearSpec, version: str) -> Tensor:
        native = x.dtype == torch.bfloat16  # `to` costs a microsecond even where it has nothing to do
        a = (x if native else x.to(torch.bfloat16)).contiguous()
        codes, scales = weights["cpu_codes"], weights["cpu_scales_and_zeros"]
        if version == "GEMV":
            y = torch._weight_int4pack_mm_for_cpu(a, codes, spec.in_features // scales.shape[0], scales)
        else:
            y = _gemm(a, codes, scales)
        if y.shape[1] != spec.out_features:
            y = y[:, : spec.out_features]
        index = weights.get("cpu_index")
        if index is not None:
            _add_outliers(y, x.index_select(1, index), weights["cpu_residual"], version)
        return y if native else y.to(x.dtype)


def _affine(packed: PackedInt4) -> tuple[Tensor, Tensor]:
    """scale and zero of w = (q - 8) * scale + zero: bf16 [groups, out_features], in groups that the operator takes."""
    scales = packed.scales.to(torch.bfloat16)
    zeros = ((8 - packed.zeros().t().float()) * scales.float()).to(torch.bfloat16)
    repeats = packed.group_size // (_fit_group(packed.group_size) or packed.group_size)
    return scales.repeat_interleave(repeats, 0), zeros.repeat_interleave(repeats, 0)


def _lost(packed: PackedInt4, codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    """What rounding scale and zero takes from the weights of the input channels `index`: float32 [k, out_features]."""
    q = codes[:, index].t().float()
    group, split = index // packed.group_size, index // (packed.in_features // scales.shape[0])
    exact = (q - packed.zeros()[:, group].t()) * packed.scales[group]
    return exact - ((q - 8) * scales[split].float() + zeros[split].float())


def _add_outliers(y: Tensor, kept: Tensor, residual: Tensor, version: str) -> None:
    """y += kept [rows, k] residual: for a few rows float32 costs a third of the bf16 product, for many a multiple."""
    if version == "GEMV":
        y.add_(kept.float() @ residual)
    else:
        y.addmm_(kept.to(torch.bfloat16), residual.to(torch.bfloat16))


def _gemm(a: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """a bf16 [rows, in_features] times the operator's own bytes: bf16 [rows, out_features]."""
    (rows, in_features), block = a.shape, _block()
    blocks = codes.view(-1, in_features, block // 2)
    scales = scales.view(scales.shape[0], -1, 2, block // 2, 2)
    y = a.new_empty(rows, len(blocks), 2, block // 2)
    step = max(1, _CHUNK // (in_features * block))
    for first in range(0, len(blocks), step):
        chunk = slice(first, first + step)
        weight = _dequantize(blocks[chunk], scales[:, chunk])
        y[:, chunk] = (a @ weight).view(2, rows, -1, block // 2).permute(1, 2, 0, 3)
    return y.view(rows, -1)


def _dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [blocks, in_features, B/2] and bf16 [groups, blocks, 2, B/2, 2] -> bf16 [2, in_features, blocks * B/2].

    The low nibbles' channels and the high nibbles' stay apart: separating them costs less in the product's output.
    """
    groups, in_features = scales.shape[0], blocks.shape[1]
    packed = blocks.transpose(0, 1).reshape(in_features, -1)
    codes = torch.empty(2, *packed.shape, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=codes[0])
    torch.bitwise_right_shift(packed, 4, out=codes[1])
    weight = codes.view(torch.int8).sub_(8).to(torch.bfloat16).view(2, groups, in_features // groups, -1)
    scale, zero = scales.permute(4, 2, 0, 1, 3).reshape(2, 2, groups, 1, -1)
    return torch.addcmul(zero, weight, scale, out=weight).view(2, in_features, -1)


@lru_cache
def _block() -> int:
    """How many output channels torch's operator interleaves on this CPU; 0 where it is absent or not vectorized.

    Found by packing known codes and taking the layout that gives them back.
    """
    codes = torch.randint(16, (2 * _PADDED, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (AttributeError, RuntimeError):
        return 0
    return next((block for block in _BLOCKS if torch.equal(_unpack(packed, block), codes)), 0)


def _unpack(packed: Tensor, block: int) -> Tensor:
    """The codes [out_features, in_features] of packed bytes that interleave `block` output channels."""
    blocks = packed.view(-1, packed.shape[1] * 2, block // 2)
    return torch.cat([blocks & 15, blocks >> 4], dim=-1).transpose(1, 2).reshape(packed.shape[0], -1)


def _fit_group(group_size: int) -> int | None:
    """The largest group of the operator that splits this one, whose scale is then repeated."""
    return next((size for size in _GROUP_SIZES if group_size % size == 0), None)


def _pad(tensor: Tensor, dim: int) -> Tensor:
    """Zeros after the output channels, dimension `dim` of 2, up to whole blocks."""
    missing = -tensor.shape[dim] % _PADDED
    return nn.functional.pad(tensor, (0, missing) if dim else (0, 0, 0, missing))
