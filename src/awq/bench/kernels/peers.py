"""Other projects' int4 kernels, where they are installed: the same weights in their layouts and through their calls.

Each is a class with a name for tables, in which "gemv" and "gemm" mean this package's kernels. None is needed, and none
can fail the benchmark: whatever goes wrong becomes a reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from awq.bench.kernels.shapes import Setting
from awq.errors import ConfigError
from awq.packing import PackedInt4

T = TypeVar("T")
Multiply = Callable[[Tensor], Tensor]  # x [rows, in_features] -> a new y [rows, out_features]
_GROUPS = (32, 64, 128)


class Peer(Protocol):
    name: str

    def rejects(self, setting: Setting) -> str | None:
        """Why it cannot run `setting` here, or None."""
        ...

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        """The dtype of x that it takes in place of `wanted`."""
        ...

    def prepare(self, packed: PackedInt4, setting: Setting) -> Multiply:
        """A copy of the weight in its own layout, bound to its kernel. May raise anything."""
        ...


class _Installed:
    """A peer of fp16 and bf16 that comes in a package."""

    name: str
    package: str
    groups: tuple[int, ...] = _GROUPS

    def rejects(self, setting: Setting) -> str | None:
        if setting.outliers:
            return "it has no fp16 outlier channels"
        if setting.group_size not in self.groups:
            return f"it has no groups of {setting.group_size}"
        return None if importlib.util.find_spec(self.package) else f"the package {self.package!r} is not installed"

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        return wanted


class TorchInt4(_Installed):
    """`torch._weight_int4pack_mm` (tinygemm): bf16 only, W = (q - 8) * scale + zero."""

    name, package, groups = "torch_int4", "torch", (32, 64, 128, 256)

    def rejects(self, setting: Setting) -> str | None:
        if setting.shape.in_features % 128:  # 8 inner tiles of 16
            return f"it needs K in multiples of 128, not {setting.shape.in_features}"
        return super().rejects(setting)

    def dtype(self, wanted: torch.dtype) -> torch.dtype:
        return torch.bfloat16

    def prepare(self, packed: PackedInt4, setting: Setting) -> Multiply:
        codes = packed.codes()
        weight = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        scales = packed.scales.float()
        zeros = (8 - packed.zeros().t().float()) * scales
        affine = torch.stack([scales, zeros], dim=-1).to(torch.bfloat16)
        return lambda x: torch._weight_int4pack_mm(x, weight, setting.group_size, affine)


class Gemlite(_Installed):
    """gemlite's Triton kernels, with the configurations that it tunes by itself."""

    name, package = "gemlite", "gemlite"

    def prepare(self, packed: PackedInt4, setting: Setting) -> Multiply:
        gemlite = _module("gemlite")
        kind = gemlite.DType.FP16 if setting.dtype == torch.float16 else gemlite.DType.BF16
        n, k = setting.shape.out_features, setting.shape.in_features
        layer = gemlite.GemLiteLinear(
            4, group_size=setting.group_size, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
        )
        scales = packed.scales.t().to(setting.dtype).contiguous()
        layer.pack(packed.codes(), scales, packed.zeros().to(setting.dtype), None)
        return _function(layer)


class Humming(_Installed):
    """humming's kernels, chosen by its own heuristics; it compiles them at first use."""

    name, package = "humming", "humming"

    def prepare(self, packed: PackedInt4, setting: Setting) -> Multiply:
        layer = (
            _module("humming.layer")
            .HummingLayer(
                shape_n=setting.shape.out_features,
                shape_k=setting.shape.in_features,
                weight_config={"quant_method": "awq", "bits": 4, "group_size": setting.group_size, "zero_point": True},
                torch_dtype=setting.dtype,
            )
            .to(packed.qweight.device)
        )
        scales = packed.scales.to(setting.dtype)
        layer.load_from_tensors({"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": scales})
        layer.transform()
        return _function(layer)


class Marlin(_Installed):
    """vLLM's Marlin, repacked from AWQ's layout as vLLM does."""

    name, package = "marlin", "vllm"

    def prepare(self, packed: PackedInt4, setting: Setting) -> Multiply:
        ops, utils, types = _vllm("marlin_utils")
        n, k, device = setting.shape.out_features, setting.shape.in_features, packed.qweight.device
        groups = k // setting.group_size
        zeros = utils.marlin_make_empty_g_idx(device)
        if setting.zero_point:
            zeros = utils.awq_to_marlin_zero_points(packed.qzeros, size_k=groups, size_n=n, num_bits=4)
        arguments = {
            "weight": ops.awq_marlin_repack(packed.qweight, size_k=k, size_n=n, num_bits=4),
            "weight_scale": utils.marlin_permute_scales(packed.scales.to(setting.dtype), k, n, setting.group_size),
            "weight_zp": zeros,
            "g_idx": utils.marlin_make_empty_g_idx(device),
            "g_idx_sort_indices": utils.marlin_make_empty_g_idx(device),
            "workspace": utils.marlin_make_workspace_new(device),
            "wtype": types.uint4 if setting.zero_point else types.uint4b8,
            "output_size_per_partition": n,
            "input_size_per_partition": k,
            "is_k_full": True,
        }
        return lambda x: _tensor(utils.apply_gptq_marlin_linear(input=x, **arguments))


class Machete(_Installed):
    """vLLM's Machete (compute capability 9.0), by its own choice of schedule."""

    name, package, groups = "machete", "vllm", (64, 128)

    def rejects(self, setting: Setting) -> str | None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            return "it needs compute capability 9.0"
        return super().rejects(setting)

    def prepare(self, packed: PackedInt4, setting: Setting) -> Multiply:
        ops, utils, types = _vllm("quant_utils")
        kind = types.uint4 if setting.zero_point else types.uint4b8
        rows = utils.pack_quantized_values_into_int32(packed.codes().t().to(torch.int32), kind, packed_dim=0)
        scales = packed.scales.to(setting.dtype).contiguous()
        weight = ops.machete_prepack_B(rows.t().contiguous().t(), setting.dtype, kind, setting.dtype)
        arguments = {"b_q": weight, "b_type": kind, "b_group_scales": scales, "b_group_size": setting.group_size}
        if setting.zero_point:
            arguments["b_group_zeros"] = (-scales * packed.zeros().t().to(setting.dtype)).contiguous()
        return lambda x: _tensor(ops.machete_mm(a=x, **arguments))


PEERS: tuple[Peer, ...] = (TorchInt4(), Gemlite(), Humming(), Marlin(), Machete())


def find_peers(names: list[str] | None) -> tuple[Peer, ...]:
    """The peers of these names, all for None; ConfigError for an unknown name."""
    if names is None:
        return PEERS
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown peer {name!r}: the peers are {', '.join(known)}.")
    return tuple(known[name] for name in names)


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result, or why there is none: the first line of whatever a peer raised."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001  # foreign code, and compilers that it starts, raise what they like
        lines = str(error).strip().splitlines()
        return None, f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _vllm(utilities: str) -> tuple[Any, Any, Any]:
    """vLLM's operators, a module of its quantization utilities, and its scalar types."""
    utils = _module(f"vllm.model_executor.layers.quantization.utils.{utilities}")
    return _module("vllm._custom_ops"), utils, _module("vllm.scalar_type").scalar_types


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _function(layer: Any) -> Multiply:
    return lambda x: _tensor(layer(x))


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"the kernel returned {type(value).__name__}")
    return value
