"""Every kernel against the plain formula in float64, over ugly shapes, dtypes, strides and values."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.config import KERNEL_VERSIONS
from awq.hardware import describe
from awq.kernels import KERNELS, Kernel, LinearSpec, cpu
from awq.packing import Outliers, PackedInt4, pack
from tests.kernels.plain import CPU, ONLY, plain, plain_weight, random_outliers, random_packed, row_errors, run, spec_of

ROWS = (1, 2, 7, 8, 9, 17, 33, 65)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tolerance(kernel: Kernel, dtype: torch.dtype) -> float:
    """Of the root mean square of many rows' errors; a single row may be three times as unlucky.

    Rounding x, a scale, a weight and y to bf16 costs 2^-9 / sqrt(3) = 1.1e-3 each, more where y exceeds its terms;
    to fp16 an eighth of that. float32 adds up 1e-7s.
    """
    if dtype == torch.float32 and kernel.name != "cpu":
        return 3e-6
    return 6e-4 if dtype == torch.float16 and kernel.name == "reference" else 6e-3


def check(y: Tensor, x: Tensor, packed: PackedInt4, outliers: Outliers | None, limit: float) -> None:
    errors = row_errors(y, x, packed, outliers)
    assert errors.max() < 3 * limit
    assert errors.square().mean().sqrt() < limit


def accepted(*group_sizes: int) -> list[Any]:
    """Every kernel with the groups that it takes on this CPU; -1 is one group of 96 input channels."""
    return [
        pytest.param(kernel, size, id=f"{kernel.name}-{size}")
        for kernel, size in itertools.product(KERNELS, group_sizes)
        if not kernel.rejects(LinearSpec(96, 8, 96 if size == -1 else size), describe("cpu"))
    ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[parameter.values[0] for parameter in accepted(32)], ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize(("kernel", "group_size"), accepted(-1, 16, 32, 64, 128))
def test_against_the_formula(kernel: Kernel, group_size: int, zero_point: bool, count: int) -> None:
    unit = 96 if group_size == -1 else group_size
    for out_features, in_features in ((8, unit), (24, 3 * unit), (200, 5 * unit)):
        packed = random_packed(out_features, in_features, group_size, zero_point=zero_point)
        outliers = random_outliers(packed, count) if count else None
        weights, spec = kernel.prepare(packed, outliers, CPU), spec_of(packed, outliers)
        for dtype, version in itertools.product(DTYPES, kernel.versions):
            x = torch.randn(sum(ROWS), in_features).to(dtype)
            y = torch.cat([kernel(part, weights, spec, ONLY[version]) for part in x.split(ROWS)])
            assert y.dtype == dtype and y.shape == (sum(ROWS), out_features)
            check(y, x, packed, outliers, tolerance(kernel, dtype))


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
@pytest.mark.parametrize("shape", [(8, 32), (136, 96), (200, 64)])
def test_every_single_weight(kernel: Kernel, shape: tuple[int, int], version: str) -> None:
    packed = random_packed(*shape, 32)
    y = run(kernel, torch.eye(shape[1]), packed, None, version)
    steps = (y.double() - plain_weight(packed).t()).abs() / packed.scales.repeat_interleave(32, 0)
    assert steps.max() < 15 * 2**-7


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
@pytest.mark.parametrize(("kernel", "width"), accepted(48, 80, 160, 576))
def test_a_channel_wide_group_of_any_width(kernel: Kernel, width: int, version: str) -> None:
    packed = random_packed(16, width, -1)
    x = torch.randn(3, width)
    check(run(kernel, x, packed, None, version), x, packed, None, tolerance(kernel, torch.float32))


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_input(kernel: Kernel, dtype: torch.dtype, version: str) -> None:
    packed = random_packed(40, 64, 32)
    wide = torch.randn(5, 200).to(dtype)
    for x in (wide[:, 8:72], wide[:, 1:129:2], wide.t()[3:67].t(), wide[::2, :64], wide[:1, :64].expand(4, 64)):
        strided, dense = (run(kernel, one, packed, None, version).double() for one in (x, x.contiguous()))
        # torch adds up in another order for another stride
        assert (strided - dense).norm() <= torch.finfo(dtype).eps * dense.norm() * 4


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_spoils_itself_alone(kernel: Kernel, value: float, version: str) -> None:
    packed = random_packed(24, 64, 32)
    outliers = random_outliers(packed, 2)
    x = torch.randn(9, 64)
    good = run(kernel, x, packed, outliers, version)
    x[3, 5] = value
    y = run(kernel, x, packed, outliers, version)
    others = [row for row in range(9) if row != 3]
    assert not y[3].isfinite().any()
    assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
def test_the_same_bits_on_every_run(kernel: Kernel, version: str) -> None:
    packed = random_packed(200, 256, 64)
    x = torch.randn(17, 256)
    outliers = random_outliers(packed, 3)
    assert torch.equal(run(kernel, x, packed, outliers, version), run(kernel, x, packed, outliers, version))


def with_zero_channel(packed: PackedInt4, channel: int) -> PackedInt4:
    """The weights of one input channel made exactly zero: its codes are the zero points."""
    codes, zeros = packed.codes(), packed.zeros()
    codes[:, channel] = zeros[:, channel // packed.group_size]
    return pack(codes, zeros, packed.scales.t())


def huge_channel(rows: int, in_features: int, channel: int) -> Tensor:
    x = torch.randn(rows, in_features)
    x[:, channel] = 1000
    return x


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_huge_channel_over_zero_weights(kernel: Kernel, zero_point: bool, kept: bool, version: str) -> None:
    """Its x must not drown the others: exactly zero where symmetric, and where the channel is kept in fp16."""
    packed = with_zero_channel(random_packed(64, 256, 64, zero_point=zero_point), 70)
    outliers = random_outliers(packed, 1) if kept else None
    if outliers is not None:
        outliers.index[0] = 70
        outliers.residual.zero_()
    x = huge_channel(5, 256, 70)
    error = run(kernel, x, packed, outliers, version).double() - plain(x, packed, outliers)
    others = plain(x, packed, outliers).norm() / 5**0.5
    if kernel.name == "cpu" and zero_point and not kept:
        # bf16 cannot hold (8 - z) * scale: up to 7 * 2^-9 of a step is left of a zero weight, see the module
        assert error.abs().max() < 1000 * packed.scales.max() / 70 + 6e-3 * others
    elif kernel.name == "cpu" and zero_point:
        # what the residual, itself bf16, takes back: 2^-9 of 1/70 of a step, and y is rounded before it is added
        assert error.abs().max() < 1000 * packed.scales.max() / 70 / 100 + 6e-3 * others
    else:
        assert error.norm() / 5**0.5 < tolerance(kernel, torch.float32) * others


@pytest.mark.parametrize("version", KERNEL_VERSIONS)
def test_kept_channels_are_exact_in_spite_of_bf16_scales(kernel: Kernel, version: str) -> None:
    """x in the kept channels is 1000 times the rest, as in real models: what counts is their precision."""
    packed = random_packed(64, 256, 64)
    outliers = random_outliers(packed, 4)
    x = torch.randn(9, 256)
    x[:, outliers.index.long()] *= 1000
    check(run(kernel, x, packed, outliers, version), x, packed, outliers, tolerance(kernel, x.dtype))


needs_int4 = pytest.mark.skipif(not cpu._block(), reason="torch has no fast int4 kernel for this CPU")


@needs_int4
def test_cpu_versions_serve_the_same_weights_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(328, 96, 32)
    x = torch.randn(19, 96)
    whole = run(cpu.CpuInt4(), x, packed, None, "GEMM")
    monkeypatch.setattr(cpu, "_CHUNK", 96 * 130)
    assert torch.equal(run(cpu.CpuInt4(), x, packed, None, "GEMM"), whole)
    check(whole, x, packed, None, 5e-3)


@needs_int4
def test_cpu_weights_are_stored_once() -> None:
    packed = random_packed(256, 512, 128)
    weights = cpu.CpuInt4().prepare(packed, None, CPU)
    assert sum(tensor.nbytes for tensor in weights.values()) <= 1.1 * packed.nbytes


def test_cpu_rejects_what_torch_has_no_kernel_for(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LinearSpec(64, 64, 16)
    assert "16" in (cpu.CpuInt4().rejects(spec, describe("cpu")) or "")
    monkeypatch.setattr(cpu, "_block", lambda: 0)
    assert "no fast int4 kernel" in (cpu.CpuInt4().rejects(LinearSpec(64, 64, 32), describe("cpu")) or "")


def test_cpu_layout_of_a_torch_without_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_convert_weight_to_int4pack_for_cpu")
    cpu._block.cache_clear()
    try:
        assert cpu._block() == 0
    finally:
        cpu._block.cache_clear()


CHECK = """
import torch
from awq.hardware import describe
from awq.kernels import LinearSpec, cpu
from tests.kernels.plain import random_outliers, random_packed, row_errors, run

torch.manual_seed(0)
kernel = cpu.CpuInt4()
if reason := kernel.rejects(LinearSpec(96, 136, 32), describe("cpu")):
    print(reason)
else:
    packed = random_packed(136, 96, 32)
    outliers = random_outliers(packed, 2)
    x = torch.randn(5, 96)
    for version in kernel.versions:
        assert row_errors(run(kernel, x, packed, outliers, version), x, packed, outliers).max() < 1e-2, version
    print("block", cpu._block())
"""


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="not a CPU with AVX2")
@pytest.mark.parametrize(("capability", "said"), [("avx2", "block 32"), ("default", "no fast int4 kernel")])
def test_cpu_layouts_of_other_instruction_sets(capability: str, said: str) -> None:
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
