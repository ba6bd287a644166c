"""The own CUDA kernels as one backend: what they take, what they are given, and where their two versions cross."""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from awq import jit
from awq.capability import OWN_KERNELS, path_of, show
from awq.errors import AwqError
from awq.hardware import Device, describe, driver_version
from awq.kernels.base import EVERY_ROW, GEMV_ROWS, LinearSpec, Weights
from awq.kernels.cuda import crossover, designs, gemm, gemv, schedule
from awq.kernels.cuda.layout import SOURCES, STEP, Shape, effective_group, to_units
from awq.kernels.cuda.op import WithGradient, fitting_rows, linear
from awq.kernels.cuda.workspace import reserve
from awq.packing import Outliers, PackedInt4

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What is computed in 16 bits, and up to which n both 2**n and 2**-n are numbers of it.
_WIDE = {torch.float32: 126, torch.float64: 1022}


class Cuda:
    name = "cuda"
    versions = dict.fromkeys(("GEMM", "GEMV"), "int4 CUDA kernels of its own")

    def how(self, version: str, device: Device) -> str:
        assert device.capability is not None  # else it was rejected
        path = path_of(device.capability)
        built_on = path.gemv if version == "GEMV" else path.gemm
        return f"an own int4 CUDA kernel for {jit.arch_of(device.capability)}, built on {built_on}"

    def rejects(self, spec: LinearSpec, device: Device) -> str | None:
        if device.kind != "cuda":
            return f"it runs on NVIDIA GPUs, not on {device.kind}"
        if device.capability is None or device.capability < OWN_KERNELS:
            return f"it needs compute capability {show(OWN_KERNELS)} or newer"
        if spec.dtype not in _DTYPES:
            return f"it computes in float16 or bfloat16, not in {_name(spec.dtype)}"
        if spec.dtype == torch.bfloat16 and not path_of(device.capability).bfloat16:
            return f"the tensor cores of compute capability {show(device.capability)} take float16, not bfloat16"
        if effective_group(spec.group_size, spec.in_features) is None:
            return f"it takes groups of 32, 64, multiples of 128 and whole rows, not of {spec.group_size}"
        return (_obstacle(device.index) or _too_wide(spec, device.index)) if _is_here(device) else None

    def gemv_rows(self, spec: LinearSpec, device: Device | torch.device, weights: Weights | None = None) -> int:
        place = describe(device)
        if not _is_here(place):
            return GEMV_ROWS
        key = _key(spec, place)
        if weights is None:
            known = crossover.recall(key)
            return GEMV_ROWS if known is None else known

        @cache
        def ones() -> Tensor:
            return torch.ones(crossover.MOST_ROWS, spec.in_features, dtype=_half(spec.dtype), device=place.torch_device)

        def run(version: str, rows: int) -> Tensor:
            return self(ones()[:rows], weights, spec, EVERY_ROW if version == "GEMV" else 0)

        return crossover.find(key, run, torch.device(str(place.torch_device)))

    def prepare(
        self,
        packed: PackedInt4,
        outliers: Outliers | None,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Tensor]:
        if device.type == "cuda" and (group := effective_group(packed.group_size, packed.in_features)):
            steps = 0 if outliers is None else -(-outliers.index.numel() // STEP)
            bf16 = _half(dtype) is torch.bfloat16
            shape = Shape(packed.in_features, packed.out_features, group, steps, bf16)
            _prefetch(torch.cuda.get_device_capability(device), shape)
        units = to_units(packed, outliers, device)
        if units.codes.is_cuda:
            reserve(units.codes.get_device())
        weights = {"cuda_codes": units.codes, "cuda_affine": units.affine}
        if units.kept is not None and units.index is not None:
            weights |= {"cuda_kept": units.kept, "cuda_index": units.index}
        return weights

    def __call__(self, x: Tensor, weights: Weights, spec: LinearSpec, gemv_rows: int) -> Tensor:
        if x.dtype in _WIDE:
            return self._scaled(x, weights, spec, gemv_rows)
        arguments = (
            x,
            weights["cuda_codes"],
            weights["cuda_affine"],
            weights.get("cuda_kept"),
            weights.get("cuda_index"),
            weights.get("bias"),
            spec.in_features,
            spec.out_features,
            effective_group(spec.group_size, spec.in_features),
            gemv_rows,
        )
        if x.requires_grad and torch.is_grad_enabled():
            return WithGradient.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]
        y: Tensor = linear(*arguments)
        return y

    def _scaled(self, x: Tensor, weights: Weights, spec: LinearSpec, gemv_rows: int) -> Tensor:
        """In 16 bits, each row of x scaled by a power of two to at most 1, so that it fits and so does its result."""
        most, bias = _WIDE[x.dtype], weights.get("bias")
        exponent = torch.frexp(x.detach().abs().amax(-1, keepdim=True)).exponent.clamp(-most, most)
        scale = torch.exp2(exponent.to(x.dtype))
        y = self((x / scale).to(_half(spec.dtype)), {**weights, "bias": None}, spec, gemv_rows) * scale
        return y if bias is None else y + bias.to(x.dtype)


def _half(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype that a layer computes in which expects activations of `dtype`."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float16


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_here(device: Device) -> bool:
    return device.kind == "cuda" and device.torch_device is not None and not device.hypothetical


def _obstacle(index: int) -> str | None:
    """What keeps GPU `index` from being compiled for, loaded and run: found by repacking the smallest weight."""
    try:
        return _lasting_obstacle(index)
    except RuntimeError as error:  # torch's own, or the driver's want of memory: it may be gone the next time
        first, *_ = str(error).splitlines() or [type(error).__name__]
        return f"it does not run here now ({first.rstrip('.')})"


@lru_cache
def _lasting_obstacle(index: int) -> str | None:
    if reason := jit.missing():
        return reason
    device = torch.device("cuda", index)
    try:
        to_units(_smallest(device), None, device)
    except AwqError as error:
        if "OUT_OF_MEMORY" in str(error):
            raise
        return str(error).rstrip(".")
    return None


def _smallest(device: torch.device) -> PackedInt4:
    words = torch.zeros(32, 1, dtype=torch.int32, device=device)
    return PackedInt4(words, words[:1], torch.zeros(1, 8, dtype=torch.float16, device=device))


def _too_wide(spec: LinearSpec, index: int) -> str | None:
    """GEMV holds a row of x in shared memory, of which older GPUs have less."""
    group = effective_group(spec.group_size, spec.in_features) or 128
    if fitting_rows(index, spec.in_features, spec.out_features, group, -(-spec.outliers // STEP)):
        return None
    return f"a row of {spec.in_features} inputs does not fit into the shared memory of this GPU"


@lru_cache
def _prefetch(capability: tuple[int, int], shape: Shape) -> None:
    """Start to compile all that a linear may ask for, while the next ones are read and repacked."""
    arch = jit.arch_of(capability)
    wanted = {"GROUP": shape.group, "AWQ_BF16": int(shape.bf16)}
    many_rows = (
        request
        for request in designs.variants(arch)
        if all(request[3].get(name, value) == value for name, value in wanted.items())
    )
    jit.prefetch((*gemv.requests(shape, arch), *many_rows))


def _key(spec: LinearSpec, device: Device) -> str:
    """What a crossover depends on."""
    shape = f"{spec.out_features}x{spec.in_features}, group {spec.group_size}, {_name(_half(spec.dtype))}"
    return f"{device.name}, driver {_driver()}, kernels {_sources()}, {shape}, {spec.outliers} kept"


_driver = lru_cache(driver_version)


@lru_cache
def _sources() -> str:
    """Changes with every change to the kernels or to how they are launched."""
    launchers = (Path(str(module.__file__)) for module in (gemv, gemm, designs, schedule))
    texts = map(jit.source_text, (*sorted(SOURCES.glob("*.cu*")), *launchers))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
