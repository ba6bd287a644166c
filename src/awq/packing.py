"""`PackedInt4`, the one currency between algorithm, files and kernels, and the published layouts.

The only file that knows nibble orders. N file layouts and M kernels need N + M conversions.
The layouts, for a weight of K input and N output channels in G = K / group_size groups:

    gemm       qweight int32 [K, N/8]   qzeros int32 [G, N/8]    scales float16 [G, N]
    gemv       qweight int32 [N, K/8]   qzeros int32 [N, P/8]    scales float16 [N, P]
    gemv_fast  qweight int16 [N/4, K]   qzeros float16 [P, N]    scales float16 [P, N]

P is G padded with zeros (`_padded_groups`). The qzeros of gemv_fast are -(zero * scale) and llm-awq calls them
`scaled_zeros`. All three are as AutoAWQ 0.2.9 writes them, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from awq.errors import CheckpointError, ConfigError

LAYOUTS = ("gemm", "gemv", "gemv_fast")
# Nibble i (bits 4i..4i+3) of a gemm word holds output channel 8c + GEMM_ORDER[i]:
# channels 0..7 pack to 0x75316420.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GEMV_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
# A recovered zero point this far from a whole number means that scales and zeros do not belong together:
# rounding to float16 alone moves it by at most 15 * 2**-11.
_ZERO_TOLERANCE = 0.1


@dataclass(frozen=True)
class PackedInt4:
    """A weight in the AWQ `gemm` layout: W[n, k] = (q[n, k] - z[n, k // group]) * scale[n, k // group].

    qweight: int32 [in_features, out_features / 8]
    qzeros:  int32 [in_features / group_size, out_features / 8]
    scales:  float16 [in_features / group_size, out_features]
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    @property
    def in_features(self) -> int:
        return self.qweight.shape[0]

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.shape[0]

    @property
    def nbytes(self) -> int:
        return self.qweight.nbytes + self.qzeros.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> Self:
        return replace(
            self,
            qweight=self.qweight.to(device),
            qzeros=self.qzeros.to(device),
            scales=self.scales.to(device),
        )

    def codes(self) -> Tensor:
        """The unsigned 4-bit codes, uint8 [out_features, in_features]."""
        return unpack_words(self.qweight, GEMM_ORDER).t().contiguous()

    def zeros(self) -> Tensor:
        """The integer zero points, uint8 [out_features, in_features / group_size]."""
        return unpack_words(self.qzeros, GEMM_ORDER).t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features], computed in float32 and rounded once to `dtype`."""
        groups = self.scales.shape[0]
        codes = unpack_words(self.qweight, GEMM_ORDER).view(groups, self.group_size, -1)
        zeros = unpack_words(self.qzeros, GEMM_ORDER).unsqueeze(1)
        weight = (codes.float() - zeros.float()) * self.scales.float().unsqueeze(1)
        return weight.view(self.in_features, -1).t().to(dtype).contiguous()


@dataclass(frozen=True)
class Outliers:
    """Salient input channels kept in fp16 beside complete int4 weights: y = x W_q^T + x[:, index] @ residual.

    index:    int32 [k], ascending
    residual: float16 [k, out_features]
    """

    index: Tensor
    residual: Tensor

    @property
    def nbytes(self) -> int:
        return self.index.nbytes + self.residual.nbytes

    def to(self, device: torch.device | str) -> Self:
        return replace(self, index=self.index.to(device), residual=self.residual.to(device))

    def add_to(self, weight: Tensor) -> Tensor:
        """A copy of `weight` [out_features, in_features] with the residual added in its own dtype."""
        return weight.index_add(1, self.index.long(), self.residual.t().to(weight.dtype))


def pack_words(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """Pack the last dimension (a multiple of 8) of 4-bit values into int32; nibble i takes value order[i]."""
    grouped = values.reshape(*values.shape[:-1], -1, 8)[..., list(order)].to(torch.int32)
    words = torch.zeros(grouped.shape[:-1], dtype=torch.int32, device=values.device)
    for nibble in range(8):
        words |= grouped[..., nibble] << (4 * nibble)
    return words


def unpack_words(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_words`: uint8 values, the last dimension eight times as long."""
    return ((words.unsqueeze(-1) >> _shifts(order, words.device)) & 15).to(torch.uint8).flatten(-2)


@lru_cache
def _shifts(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each of the 8 values of a word starts; kept, since a copy to a GPU would wait for it."""
    return torch.tensor([4 * order.index(value) for value in range(8)], dtype=torch.int32, device=device)


def pack(codes: Tensor, zeros: Tensor, scales: Tensor) -> PackedInt4:
    """Pack codes [out, in], zeros [out, groups] (integers 0..15) and scales [out, groups]; out % 8 == 0."""
    return PackedInt4(
        qweight=pack_words(codes.t(), GEMM_ORDER),
        qzeros=pack_words(zeros.t(), GEMM_ORDER),
        scales=scales.t().to(torch.float16).contiguous(),
    )


@dataclass(frozen=True)
class StoredShape:
    """What the tensors of one linear hold on disk: the layout and its sizes."""

    layout: str
    in_features: int
    out_features: int
    group_size: int

    def expected(self) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """dtype and shape of each tensor of this layout."""
        k, n, groups = self.in_features, self.out_features, self.in_features // self.group_size
        padded = _padded_groups(k, self.group_size)
        if self.layout == "gemm":
            weight, zeros, scales = (torch.int32, (k, n // 8)), (torch.int32, (groups, n // 8)), (groups, n)
        elif self.layout == "gemv":
            weight, zeros, scales = (torch.int32, (n, k // 8)), (torch.int32, (n, padded // 8)), (n, padded)
        else:
            weight, zeros, scales = (torch.int16, (n // 4, k)), (torch.float16, (padded, n)), (padded, n)
        return {"qweight": weight, "qzeros": zeros, "scales": (torch.float16, scales)}

    def obstacle(self) -> str | None:
        """Why no weight of this shape can be stored in this layout, or None."""
        k, n, group_size = self.in_features, self.out_features, self.group_size
        if min(k, n, group_size) < 1 or k % group_size:
            return f"in_features {k} is not a whole number of groups of {group_size}"
        if n % 8:
            return f"out_features {n} is not a multiple of 8"
        if self.layout != "gemm" and group_size < 128 and group_size not in (32, 64):
            return f"{self.layout} has no groups of {group_size}, only of 32, 64, 128 and more"
        step = {"gemm": 1, "gemv": 8, "gemv_fast": 64}[self.layout]
        return f"{self.layout} needs in_features to be a multiple of {step}, not {k}" if k % step else None


def stored_shape(tensors: Mapping[str, Tensor], group_size: int | None = None) -> StoredShape:
    """Recognize the layout of `qweight`, `qzeros` and `scales` (meta tensors will do) and check all three.

    group_size: what the configuration says (-1 for whole rows), checked against the shapes; None infers it (the
    padded layouts do not tell more than 128 from 128).
    CheckpointError when they fit no layout.
    """
    qweight, scales = tensors["qweight"], tensors["scales"]
    if qweight.dim() != 2 or scales.dim() != 2:
        raise CheckpointError(f"qweight {_describe(qweight)} and scales {_describe(scales)} are not matrices")
    rows, columns = qweight.shape
    if qweight.dtype == torch.int16:
        layout, k, n, stored = "gemv_fast", columns, 4 * rows, scales.shape[0]
    elif scales.shape[0] == rows:
        layout, k, n, stored = "gemv", 8 * columns, rows, scales.shape[1]
    else:
        layout, k, n, stored = "gemm", rows, 8 * columns, scales.shape[0]
    shape = StoredShape(layout, k, n, _group_size(layout, k, stored, group_size))
    _check_stored(shape, tensors)
    return shape


def from_layout(tensors: Mapping[str, Tensor], group_size: int | None = None) -> PackedInt4:
    """Read `qweight`, `qzeros` and `scales` of any layout; see `stored_shape` for `group_size` and errors.

    Scales stored as bfloat16 or float32 are rounded to float16.
    """
    shape = stored_shape(tensors, group_size)
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"].to(torch.float16)
    if shape.layout == "gemm":
        return PackedInt4(qweight.contiguous(), qzeros.contiguous(), scales.contiguous())
    groups = shape.in_features // shape.group_size
    if shape.layout == "gemv":
        zeros = unpack_words(qzeros, _GEMV_ORDER)[:, :groups]
        return pack(unpack_words(qweight, _GEMV_ORDER), zeros, scales[:, :groups])
    scales = scales[:groups].t()
    return pack(_unpack_fast(qweight), _whole_zeros(qzeros[:groups].t(), scales), scales)


def to_layout(layout: str, packed: PackedInt4) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` in one of LAYOUTS; ConfigError when the layout cannot hold this shape."""
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}: use one of {', '.join(LAYOUTS)}.")
    shape = StoredShape(layout, packed.in_features, packed.out_features, packed.group_size)
    if reason := shape.obstacle():
        raise ConfigError(f"the weight cannot be stored: {reason}; the gemm layout takes it.")
    if layout == "gemm":
        return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    padding = (0, _padded_groups(shape.in_features, shape.group_size) - packed.scales.shape[0])
    codes, zeros, scales = packed.codes(), packed.zeros(), packed.scales.t()
    padded_scales = torch.nn.functional.pad(scales, padding)
    if layout == "gemv":
        padded_zeros = pack_words(torch.nn.functional.pad(zeros, padding), _GEMV_ORDER)
        return {"qweight": pack_words(codes, _GEMV_ORDER), "qzeros": padded_zeros, "scales": padded_scales}
    scaled = -(scales.float() * zeros.float()).to(torch.float16)
    padded_zeros = torch.nn.functional.pad(scaled, padding).t().contiguous()
    return {"qweight": _pack_fast(codes), "qzeros": padded_zeros, "scales": padded_scales.t().contiguous()}


def _padded_groups(in_features: int, group_size: int) -> int:
    """Groups as gemv and gemv_fast store them: to the next multiple of 8, of 16 (groups of 64) or 32 (of 32)."""
    step = {32: 32, 64: 16}.get(group_size, 8)
    return -(-(in_features // group_size) // step) * step


def _group_size(layout: str, in_features: int, stored_groups: int, configured: int | None) -> int:
    if configured is not None:
        return in_features if configured == -1 else configured
    if layout == "gemm":
        return in_features // max(stored_groups, 1)
    fits = (size for size in (128, 64, 32) if _padded_groups(in_features, size) == stored_groups)
    return next(fits, in_features)


def _check_stored(shape: StoredShape, tensors: Mapping[str, Tensor]) -> None:
    if reason := shape.obstacle():
        raise CheckpointError(f"the tensors look like the {shape.layout} layout, but {reason}")
    for name, (dtype, size) in shape.expected().items():
        tensor = tensors[name]
        same_dtype = tensor.dtype == dtype or (name == "scales" and tensor.dtype.is_floating_point)
        if not same_dtype or tensor.shape != size:
            raise CheckpointError(
                f"{name} is {_describe(tensor)} where the {shape.layout} layout with groups of {shape.group_size} "
                f"needs {str(dtype).removeprefix('torch.')} {list(size)}"
            )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _whole_zeros(scaled: Tensor, scales: Tensor) -> Tensor:
    """The integer zero points behind -(zero * scale); a group whose scale is 0 gets zero 0."""
    zeros = -scaled.float() / scales.float().where(scales != 0, 1.0)
    whole = zeros.round()
    if not ((zeros - whole).abs() <= _ZERO_TOLERANCE).all() or whole.min() < 0 or whole.max() > 15:
        raise CheckpointError("the scaled zeros are not whole multiples 0..15 of the scales")
    return whole.to(torch.uint8)


# gemv_fast stores 32 input channels as (j, t, i) of the channel 8i + 2j + t, then interleaves four rows in
# blocks of 64 channels; four consecutive values make an int16, the first in its lowest bits.


def _pack_fast(codes: Tensor) -> Tensor:
    """Codes uint8 [N, K] as int16 [N/4, K]; N % 4 == 0 and K % 64 == 0."""
    rows, columns = codes.shape
    mixed = codes.reshape(rows, columns // 32, 4, 4, 2).permute(0, 1, 3, 4, 2)
    blocks = mixed.reshape(rows // 4, 4, columns // 64, 64).transpose(1, 2)
    nibbles = blocks.reshape(rows // 4, columns, 2, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).view(torch.int16).squeeze(-1)


def _unpack_fast(words: Tensor) -> Tensor:
    """The inverse of `_pack_fast`."""
    rows, columns = 4 * words.shape[0], words.shape[1]
    octets = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1)
    blocks = nibbles.view(rows // 4, columns // 64, 4, 64).transpose(1, 2)
    mixed = blocks.reshape(rows, columns // 32, 4, 2, 4)
    return mixed.permute(0, 1, 4, 2, 3).reshape(rows, columns)
