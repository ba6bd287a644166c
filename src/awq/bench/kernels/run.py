"""Latency of one quantized linear by rows of its input, for both kernel versions and a dense linear beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.kernels.weights import random_linear
from awq.bench.results import DENSE, Ceiling, KernelBench, row_of
from awq.bench.timing import measure
from awq.config import KERNEL_VERSIONS
from awq.errors import KernelNotSupportedError
from awq.kernels import LinearSpec, select
from awq.linear import QuantLinear
from awq.progress import Progress, track

if TYPE_CHECKING:
    from awq.bench.kernels.cold import Multiply
    from awq.bench.kernels.peers import Peer
    from awq.kernels.cuda.layout import Units

__all__ = ["KernelBench", "Setting", "Shape", "bench_kernels", "bench_settings"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_OWN = "cuda"  # the kernel of this package's own CUDA code
_PDL_CAPABILITY = (9, 0)


def bench_kernels(
    shapes: Sequence[Shape],
    device: torch.device,
    *,
    rows: Sequence[int] = ROWS,
    group_size: int = 64,
    outlier_ratio: float = 0.0,
    dtype: torch.dtype | None = None,
    seconds: float = 0.2,
    progress: bool = True,
) -> KernelBench:
    """`bench_settings` of linears with zero points that differ in shape only."""
    dtype = dtype or default_dtype(device)
    settings = [Setting(shape, group_size, dtype, outlier_ratio=outlier_ratio) for shape in shapes]
    return bench_settings(settings, device, rows=rows, seconds=seconds, progress=progress)


def bench_settings(
    settings: Sequence[Setting],
    device: torch.device,
    *,
    rows: Sequence[int] = ROWS,
    versions: Sequence[str] = KERNEL_VERSIONS,
    peers: Sequence[Peer] = (),
    seconds: float = 0.2,
    progress: bool = True,
) -> KernelBench:
    """Time random linears, each version pinned in turn, beside a dense one of the same dtype.

    This package's own CUDA kernels run over weights that the L2 cache cannot hold, in CUDA graphs, checked against
    float32, beside `peers` and between two measurements of the read ceiling. Whatever else runs a linear here is
    timed call by call, `seconds` a figure.
    """
    found = KernelBench([], {})
    own_here = any(own_kernels(setting, device, versions)[0] for setting in settings)
    start = _read_ceiling(device) if own_here else 0.0
    with track("Timing kernels", len(settings) * len(rows), enabled=progress) as bar, torch.inference_mode():
        for setting in settings:
            own, refused = own_kernels(setting, device, versions)
            if own:
                with _current(device):
                    _bench_own(setting, device, own, rows, peers, found, bar)
                found.refused.update(refused)
            else:
                _bench_any(setting, device, versions, rows, seconds, found, bar)
    ceiling = Ceiling(start, _read_ceiling(device)) if own_here else None
    return KernelBench(found.rows, found.refused, ceiling, found.left_out, found.notes)


def default_dtype(device: torch.device) -> torch.dtype:
    """Of the activations: float16 on a GPU, bfloat16 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def own_kernels(
    setting: Setting, device: torch.device, versions: Sequence[str]
) -> tuple[dict[str, Multiply], dict[str, str]]:
    """This package's CUDA kernels for a linear, by version, and why a version has none."""
    if device.type != "cuda":
        return {}, {}
    found: dict[str, Multiply] = {}
    refused: dict[str, str] = {}
    for version in versions:
        try:
            choice = select(_spec(setting), device, version)
        except KernelNotSupportedError as error:
            refused[version] = str(error)
            continue
        if choice.kernel.name == _OWN:
            found[version] = _multiply_gemv if version == "GEMV" else _multiply_gemm
        else:
            refused[version] = choice.refused.get(_OWN, choice.reason)
    return found, refused


def _bench_own(
    setting: Setting,
    device: torch.device,
    own: dict[str, Multiply],
    rows: Sequence[int],
    peers: Sequence[Peer],
    found: KernelBench,
    bar: Progress,
) -> None:
    from awq.bench.kernels.cold import ColdLinear

    linear = ColdLinear(setting, device, own, _has_pdl(device))
    for peer in peers:
        linear.add(peer)
    for count in rows:
        found.rows.extend(linear.measure(count))
        bar.advance(note=f"{setting.shape}, {count} rows")
    found.notes.extend(linear.notes)
    found.left_out.update(linear.left_out)


def _bench_any(
    setting: Setting,
    device: torch.device,
    versions: Sequence[str],
    rows: Sequence[int],
    seconds: float,
    found: KernelBench,
    bar: Progress,
) -> None:
    timed = []
    candidates = list(_candidates(setting, device, versions, found.refused))
    for count in rows:
        x = torch.randn(count, setting.shape.in_features, device=device, dtype=setting.dtype)
        for version, linear, kernel in candidates:
            timed.append(row_of(setting, count, version, kernel, measure(partial(linear, x), device, seconds=seconds)))
        bar.advance(note=f"{setting.shape}, {count} rows")
    order = [version for version, _, _ in candidates]
    found.rows.extend(sorted(timed, key=lambda row: order.index(row.version)))


def _candidates(
    setting: Setting, device: torch.device, versions: Sequence[str], refused: dict[str, str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """(version, linear, kernel) of each version that this machine runs; the others' reasons go to `refused`."""
    packed, outliers = random_linear(setting, device)
    for version in versions:
        linear = QuantLinear(packed, None, outliers)
        try:
            choice = linear.prepare(version=version, dtype=setting.dtype)
        except KernelNotSupportedError as error:
            refused[version] = str(error)
        else:
            yield version, linear, choice.kernel.name
    n, k = setting.shape.out_features, setting.shape.in_features
    yield DENSE, nn.Linear(k, n, bias=False, device=device, dtype=setting.dtype), "torch"


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _PDL_CAPABILITY


def _spec(setting: Setting) -> LinearSpec:
    n, k = setting.shape.out_features, setting.shape.in_features
    return LinearSpec(k, n, setting.group_size, setting.dtype, setting.outliers)


def _read_ceiling(device: torch.device) -> float:
    from awq.bench.kernels.ceiling import read_ceiling

    return read_ceiling(device)


def _multiply_gemv(x: Tensor, units: Units, y: Tensor) -> None:
    from awq.kernels.cuda.gemv import gemv
    from awq.kernels.cuda.op import fitting_rows

    steps = 0 if units.kept is None else units.kept.shape[1]
    most = fitting_rows(x.get_device(), units.in_features, units.out_features, units.group, steps)
    for some, result in zip(x.split(most), y.split(most), strict=True):
        gemv(some, units, None, result)


def _multiply_gemm(x: Tensor, units: Units, y: Tensor) -> None:
    from awq.kernels.cuda.gemm import gemm

    gemm(x, units, None, y)
