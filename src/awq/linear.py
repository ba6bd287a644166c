"""`QuantLinear`: the only quantized module. It holds a packed weight and lets a kernel multiply by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from awq.errors import AwqError
from awq.kernels import UNPREPARED, Choice, LinearSpec, select
from awq.kernels.base import packed_weights
from awq.packing import Outliers, PackedInt4


class QuantLinear(nn.Module):
    """y = x W_q^T + x[..., index] R + bias, for any number of rows.

    As constructed its buffers are the checkpoint's tensors (qweight, qzeros, scales, bias, and outlier_index and
    outlier_residual where channels are kept), which the reference kernel runs in float32. `prepare` picks a kernel for
    their device and repacks them for it. Casting the model leaves them as they are; only the bias follows.

    in_features, out_features, group_size: of the weight; weight_dtype: float16, in which its scales are stored
    choice: the kernel in use, its pinned version and the reasons
    """

    def __init__(self, packed: PackedInt4, bias: Tensor | None = None, outliers: Outliers | None = None) -> None:
        super().__init__()
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.group_size = packed.group_size
        self.weight_dtype = packed.scales.dtype
        kept = outliers.index.numel() if outliers is not None else 0
        self.spec = LinearSpec(self.in_features, self.out_features, self.group_size, outliers=kept)
        self.register_buffer("bias", bias)
        self._again: tuple[str | None, str | None, bool, torch.dtype] | None = None  # what `prepare` was asked for
        self._use(self.spec, UNPREPARED, packed_weights(packed, outliers if kept else None))

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    @property
    def packed(self) -> PackedInt4:
        """The weight in the checkpoint's layout; AwqError where `prepare` released it."""
        self._check_packed()
        return PackedInt4(*(self.get_buffer(name) for name in ("qweight", "qzeros", "scales")))

    @property
    def outliers(self) -> Outliers | None:
        """The fp16 channels beside it, None without any; AwqError where `prepare` released them."""
        self._check_packed()
        if not self.spec.outliers:
            return None
        return Outliers(self.get_buffer("outlier_index"), self.get_buffer("outlier_residual"))

    def prepare(
        self,
        version: str | None = None,
        kernel: str | None = None,
        keep_packed: bool = False,
        dtype: torch.dtype = torch.float16,
    ) -> Choice:
        """Pick a kernel for the device that the weights are on, and repack them for it.

        version:     "GEMM" or "GEMV" pins it for every call; None or "auto" goes by the rows of each
        kernel:      the name of the one to use
        keep_packed: keep the checkpoint's tensors too: the layer can then be saved, and moved to another kind of device
        dtype:       of the activations to expect
        Raises KernelNotSupportedError, and AwqError where an earlier `prepare` released the packed weight.
        """
        packed, outliers = self.packed, self.outliers
        spec = replace(self.spec, dtype=dtype)
        choice = select(spec, self.device, version, kernel)
        weights = choice.kernel.prepare(packed, outliers, self.device, dtype)
        self._use(spec, choice, packed_weights(packed, outliers) | weights if keep_packed else weights)
        self._again = (version, kernel, keep_packed, dtype)
        return choice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of any strides -> [..., out_features] in the same dtype.

        x: float16, bfloat16, float32 or float64. The result is as exact as the dtype that the kernel computes in: the
           CUDA kernels multiply float32 and float64 in 16 bits with float32 sums, `cpu` all of them in bfloat16
        Raises AwqError for an x that the kernel does not take, such as bfloat16 on compute capability 7.5.
        """
        return self._kernel(x, self._buffers, self.spec, self._gemv_rows)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bias={self._buffers['bias'] is not None}, outliers={self.spec.outliers}, "
            f"kernel={self._kernel.name}, version={self.choice.version or 'auto'}"
        )

    def _use(self, spec: LinearSpec, choice: Choice, weights: dict[str, Tensor]) -> None:
        """Let `choice` run on `weights`, which replace every buffer but the bias."""
        device = next(iter(weights.values())).device
        # Measured, it may fail: nothing is replaced before.
        gemv_rows = choice.gemv_rows(spec, device, {**weights, "bias": self._buffers["bias"]})
        for name in [name for name in self._buffers if name != "bias"]:
            delattr(self, name)
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)
        self.spec = spec
        self._choose(choice, gemv_rows)

    def _choose(self, choice: Choice, gemv_rows: int) -> None:
        self.choice = choice
        self._kernel, self._gemv_rows = choice.kernel, gemv_rows  # looked up on every call, so kept at hand

    def _check_packed(self) -> None:
        if "qweight" not in self._buffers:
            raise AwqError(
                f"this linear was repacked for the kernel {self._kernel.name!r} and its packed weight released: "
                "prepare it with keep_packed=True, or load the checkpoint again for the device or kernel wanted."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast of the module: weights keep their dtype, and another device gets its own choice.

        Another kind of device, or a GPU that another kernel serves, repacks them.
        """
        again, choice, repack = self._again, None, False
        if again and (target := self._target(fn)):
            if target.type == self.device.type:
                choice = select(self.spec, target, *again[:2])
            repack = choice is None or choice.kernel.name != self._kernel.name
        if repack:
            self._use(self.spec, UNPREPARED, packed_weights(self.packed, self.outliers))
        bias = self._buffers["bias"]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if again and repack:
            self.prepare(*again)
        elif choice:
            self._choose(choice, choice.gemv_rows(self.spec, self.device, self._buffers))
        return self

    def _target(self, fn: Callable[[Tensor], Tensor]) -> torch.device | None:
        """The device that `fn` moves tensors to; None where they stay, or lose their values."""
        target = fn(torch.empty(0, device=self.device)).device
        return None if target == self.device or target.type == "meta" else target
