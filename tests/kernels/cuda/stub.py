"""The CUDA kernels played by torch on the CPU, so that what leads to them is tested without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from awq.kernels import Choice
from awq.kernels.cuda import Cuda, op
from awq.kernels.cuda.layout import Units, units_to_dense
from awq.linear import QuantLinear
from tests.kernels.plain import CPU


@dataclass(frozen=True)
class Call:
    """What a kernel was given: x as it lies in memory, and dtypes."""

    version: str
    rows: int
    stride: tuple[int, ...]
    address: int
    bias: torch.dtype | None
    dtype: torch.dtype


@contextmanager
def stub_kernels(monkeypatch: pytest.MonkeyPatch, launch_rows: int = 8) -> Iterator[list[Call]]:
    """`torch.ops.awq.linear` runs on the CPU as it would on a GPU; yields the calls of its kernels."""
    calls: list[Call] = []

    def play(version: str, x: Tensor, units: Units, bias: Tensor | None, out: Tensor) -> None:
        """The formula, with fp16 products summed in float32."""
        assert x.dim() == 2 and out.is_contiguous() and out.numel() == len(x) * units.out_features
        assert bias is None or bias.dtype == x.dtype == out.dtype
        calls.append(Call(version, len(x), x.stride(), x.data_ptr(), None if bias is None else bias.dtype, x.dtype))
        y = x.float() @ units_to_dense(units).t()
        if units.kept is not None and units.index is not None:
            used = units.index >= 0
            tiles = units.kept.view(len(units.kept), -1, 8, 4, 2, 2, 2)  # steps, r, c, half k, half rows, bit
            residual = tiles.permute(1, 4, 3, 6, 0, 5, 2).reshape(len(used), -1)[:, : units.out_features]
            y += x[:, units.index[used].long()].float() @ residual[used].float()
        out.view_as(y).copy_(y if bias is None else y + bias.float())

    monkeypatch.setattr(op.gemv, "gemv", lambda *arguments: play("GEMV", *arguments))
    monkeypatch.setattr(op.gemm, "gemm", lambda *arguments: play("GEMM", *arguments))
    monkeypatch.setattr(op, "fitting_rows", lambda *sizes: launch_rows)
    monkeypatch.setattr(op, "_dtypes", lambda index: frozenset({torch.float16, torch.bfloat16}))
    monkeypatch.setattr(op, "_current_device", lambda: -1)  # what tensors on the CPU give as their device
    library = torch.library.Library("awq", "IMPL")
    library.impl("linear", op.launch, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def prepared(linear: QuantLinear, version: str | None = None) -> QuantLinear:
    """`linear` as `prepare` leaves it on a GPU."""
    linear._use(linear.spec, Choice(Cuda(), version, "played"), Cuda().prepare(linear.packed, linear.outliers, CPU))
    return linear
