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
        self._use(UNPREPARED, packed_weights(packed, outliers if kept else None))

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
        self.spec = spec
        self._use(choice, packed_weights(packed, outliers) | weights if keep_packed else weights)
        self._again = (version, kernel, keep_packed, dtype)
        return choice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] of any float dtype and strides -> [..., out_features] in the same dtype."""
        return self._kernel(x, self._buffers, self.spec, self._gemv_rows)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bias={self._buffers['bias'] is not None}, outliers={self.spec.outliers}, "
            f"kernel={self._kernel.name}, version={self.choice.version or 'auto'}"
        )

    def _use(self, choice: Choice, weights: dict[str, Tensor]) -> None:
        """Let `choice` run on `weights`, which replace every buffer but the bias."""
        for name in [name for name in self._buffers if name != "bias"]:
            delattr(self, name)
        for name, tensor in weights.items():
            self.register_buffer(name, tensor)
        self.choice = choice
        # Looked up on every call, so kept at hand.
        self._kernel, self._gemv_rows = choice.kernel, choice.gemv_rows(self.spec, self.device, self._buffers)

    def _check_packed(self) -> None:
        if "qweight" not in self._buffers:
            raise AwqError(
                f"this linear was repacked for the kernel {self._kernel.name!r} and its packed weight released: "
                "prepare it with keep_packed=True, or load the checkpoint again for the device or kernel wanted."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Every move and cast of the module: weights keep their dtype, and another kind of device repacks them."""
        repack = self.choice is not UNPREPARED and self._leaves(fn)
        if repack:
            self._use(UNPREPARED, packed_weights(self.packed, self.outliers))
        bias = self._buffers["bias"]

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if repack:
            self.prepare(*self._again)
        return self

    def _leaves(self, fn: Callable[[Tensor], Tensor]) -> bool:
        """Whether `fn` moves tensors to another kind of device, where this kernel's layout means nothing."""
        target = fn(torch.empty(0, device=self.device)).device.type
        return target not in (self.device.type, "meta")
