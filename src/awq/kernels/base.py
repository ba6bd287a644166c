"""What a kernel is: a backend that prepares a packed weight once and multiplies by it many times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from awq.hardware import Device
from awq.packing import Outliers, PackedInt4

# GEMV serves up to so many rows where no crossover was measured.
GEMV_ROWS = 8
# More rows than any call has: GEMV serves them all.
EVERY_ROW = 2**62

# The buffers of a prepared layer by name; others' may lie beside them, and optional ones be absent or None.
Weights = Mapping[str, Any]


@dataclass(frozen=True)
class LinearSpec:
    """The linear that a kernel is asked to run.

    group_size: input channels that share a scale, in_features where it is per channel
    dtype:      the activations' dtype that is expected; a call may bring another
    outliers:   how many input channels have an fp16 residual
    """

    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype = torch.float16
    outliers: int = 0


class Kernel(Protocol):
    """One backend: one file in this folder and one line in `KERNELS`.

    name:     what `kernel=` calls it
    versions: the versions that it runs, each with how, in a few words for the reasons that users read
    """

    @property
    def name(self) -> str: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    def how(self, version: str, device: Device) -> str:
        """How it runs a version of `versions` on `device`."""
        ...

    def rejects(self, spec: LinearSpec, device: Device) -> str | None:
        """Why this kernel cannot run `spec` on `device`; None when it can."""
        ...

    def gemv_rows(self, spec: LinearSpec, device: Device | torch.device, weights: Weights | None = None) -> int:
        """Up to so many rows GEMV is the faster version; with `weights`, what `prepare` gave, it may be measured."""
        ...

    def prepare(
        self,
        packed: PackedInt4,
        outliers: Outliers | None,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Tensor]:
        """The weight in this kernel's own layout, one for all its versions, as named tensors on `device`.

        dtype: of the activations to expect
        """
        ...

    def __call__(self, x: Tensor, weights: Weights, spec: LinearSpec, gemv_rows: int) -> Tensor:
        """x [..., in_features], of any strides and number of rows -> a new [..., out_features] in x.dtype.

        weights:   what `prepare` gave, and "bias" [out_features] where there is one
        gemv_rows: GEMV runs calls of up to so many rows, GEMM larger ones; 0 and EVERY_ROW pin a version
        """
        ...


class RowKernel:
    """What kernels share that multiply a matrix x and leave its shape and the bias to this class."""

    versions: Mapping[str, str]

    def how(self, version: str, device: Device) -> str:
        return self.versions[version]

    def gemv_rows(self, spec: LinearSpec, device: Device | torch.device, weights: Weights | None = None) -> int:
        return GEMV_ROWS

    def multiply(self, x: Tensor, weights: Weights, spec: LinearSpec, version: str) -> Tensor:
        """x [rows, in_features], of any strides and at least one row -> a new [rows, out_features] in x.dtype."""
        raise NotImplementedError

    def __call__(self, x: Tensor, weights: Weights, spec: LinearSpec, gemv_rows: int) -> Tensor:
        rows = x.numel() // spec.in_features
        if rows == 0:
            return x.new_empty(*x.shape[:-1], spec.out_features)
        version = "GEMV" if rows <= gemv_rows else "GEMM"
        y = self.multiply(x.reshape(rows, spec.in_features), weights, spec, version)
        bias = weights.get("bias")
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], spec.out_features)


def packed_weights(packed: PackedInt4, outliers: Outliers | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: the layout of kernels that dequantize it as it is."""
    weights = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    if outliers is not None:
        weights |= {"outlier_index": outliers.index, "outlier_residual": outliers.residual}
    return weights


def dequantize_and_multiply(x: Tensor, weights: Weights, dtype: torch.dtype) -> Tensor:
    """x W^T + x[:, outliers] R of `packed_weights`, both products in `dtype`, which the result keeps."""
    packed = PackedInt4(weights["qweight"], weights["qzeros"], weights["scales"])
    x = x.to(dtype)
    y = x @ packed.dequantize(dtype).t()
    index = weights.get("outlier_index")
    return y if index is None else y.addmm_(x.index_select(1, index), weights["outlier_residual"].to(dtype))
