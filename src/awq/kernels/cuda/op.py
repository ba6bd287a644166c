"""`torch.ops.awq.linear`, the one operator over the units of `layout`: eager, compiled and in CUDA graphs.

Everything here runs on every call of every linear, so it looks up little and builds less. `Library.define` and `impl`,
since a `custom_op` costs several times as much a call.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from awq.errors import AwqError
from awq.kernels.cuda import gemm, gemv
from awq.kernels.cuda.layout import Shape, Units

_MOST_STRIDE = 2**31  # elements from one row of x to the next: kernels take a 32-bit number
_LIBRARY = torch.library.Library("awq", "FRAGMENT")
_LIBRARY.define(
    "linear(Tensor x, Tensor codes, Tensor affine, Tensor? kept, Tensor? index, Tensor? bias, "
    "int in_features, int out_features, int group, int gemv_rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def launch(
    x: Tensor,
    codes: Tensor,
    affine: Tensor,
    kept: Tensor | None,
    index: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    group: int,
    gemv_rows: int,
) -> Tensor:
    """x [..., in_features] float16 or bfloat16 -> a new contiguous [..., out_features]; what `Units` holds is theirs.

    gemv_rows: GEMV up to so many rows, a few of them a launch, GEMM for more
    AwqError where x has another width, dtype or device than the weight takes.
    """
    shape, place = x.shape, codes.get_device()
    if x.get_device() != place or x.dtype not in _dtypes(place) or shape[-1] != in_features:
        raise AwqError(_complaint(x, codes, in_features))
    if len(shape) == 2:
        rows = shape[0]
        y = x.new_empty((rows, out_features))
    else:
        rows = x.numel() // in_features
        y = x.new_empty((*shape[:-1], out_features))
        x = x.reshape(rows, in_features)
    if rows == 0:
        return y
    stride, step = x.stride()
    if step != 1 or stride % 8 or not in_features <= stride < _MOST_STRIDE or in_features % 8 or x.data_ptr() % 16:
        x = _aligned(x)
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.to(x.dtype)
    units = Units(codes, affine, kept, index, in_features, out_features, group)
    if _current_device() == place:
        _multiply(x, rows, units, bias, y, gemv_rows)
    else:
        with torch.cuda.device(place):
            _multiply(x, rows, units, bias, y, gemv_rows)
    return y


def shape_only(x: Tensor, *others: Any) -> Tensor:
    """What `launch` returns for the same arguments, without its values: all that tracing needs."""
    out_features = others[6]
    return x.new_empty((*x.shape[:-1], out_features))


_LIBRARY.impl("linear", launch, "CUDA")
_LIBRARY.impl("linear", shape_only, "Meta")
linear = torch.ops.awq.linear.default


class WithGradient(torch.autograd.Function):
    """`linear` for an x that requires a gradient. In Python's hands: an autograd kernel would cost every call."""

    @staticmethod
    def forward(x: Tensor, *others: Any) -> Tensor:
        y: Tensor = linear(x, *others)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        _, *weights, ctx.in_features, ctx.out_features, ctx.group, _ = inputs
        ctx.save_for_backward(*weights[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad (W + R), where the identity times the weight is its transpose. The weight has no gradient."""
        identity = torch.eye(ctx.in_features, dtype=grad.dtype, device=grad.device)
        weight = linear(identity, *ctx.saved_tensors, None, ctx.in_features, ctx.out_features, ctx.group, 0)
        return grad @ weight.t(), *[None] * 9


def _multiply(x: Tensor, rows: int, units: Units, bias: Tensor | None, y: Tensor, gemv_rows: int) -> None:
    if rows > gemv_rows:
        gemm.gemm(x, units, bias, y)
    elif rows == 1 or rows <= (most := _launch_rows(y.get_device(), units)):
        gemv.gemv(x, units, bias, y)
    else:
        for some, out in zip(x.split(most), y.view(rows, -1).split(most), strict=True):
            gemv.gemv(some, units, bias, out)


def _launch_rows(index: int, units: Units) -> int:
    """How many rows one launch of the GEMV takes: 8, fewer where they do not fit into shared memory."""
    steps = 0 if units.kept is None else units.kept.shape[1]
    return fitting_rows(index, units.in_features, units.out_features, units.group, steps)


@lru_cache(4096)
def fitting_rows(index: int, in_features: int, out_features: int, group: int, kept_steps: int) -> int:
    """The same by numbers; 0 where not even one row fits, and `Cuda` rejects the linear."""
    return gemv.max_rows(Shape(in_features, out_features, group, kept_steps, bf16=False), index)


def _aligned(x: Tensor) -> Tensor:
    """A copy of x [rows, in_features] whose rows start at multiples of 16 bytes, with zeros from one to the next."""
    rows, width = x.shape
    copy = x.new_zeros((rows, -(-width // 8) * 8))[:, :width] if width % 8 else x.new_empty((rows, width))
    return copy.copy_(x)


# torch.cuda.current_device, without its 0.2 us of asking whether CUDA was started; a CPU build of torch has none
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


@lru_cache
def _dtypes(index: int) -> frozenset[torch.dtype]:
    """What GPU `index` multiplies on its tensor cores."""
    half = frozenset({torch.float16})
    return half | {torch.bfloat16} if torch.cuda.get_device_capability(index) >= (8, 0) else half


def _complaint(x: Tensor, codes: Tensor, in_features: int) -> str:
    if x.device != codes.device:
        return f"x is on {x.device} and the weight on {codes.device}: move one of them to the other."
    if x.shape[-1] != in_features:
        return f"x has shape {list(x.shape)}, where the weight takes [..., {in_features}]."
    takes = " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in _dtypes(codes.get_device())))
    name = str(x.dtype).removeprefix("torch.")
    return f"x is {name}, which the CUDA kernels do not take on {codes.device}: cast it to {takes}."
