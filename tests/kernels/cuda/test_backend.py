"""The backend of the CUDA kernels on simulated GPUs: what it takes, what keeps it from running, what it prepares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from awq import capability, jit
from awq.capability import PATHS, path_of
from awq.errors import ConfigError, KernelError, KernelNotSupportedError
from awq.hardware import Device
from awq.kernels import KERNELS, LinearSpec, select_kernel_version
from awq.kernels.base import GEMV_ROWS
from awq.kernels.cuda import Cuda, backend, designs, gemv
from awq.kernels.cuda.layout import Shape, Units, units_to_dense
from awq.linear import QuantLinear
from tests.kernels.cuda.stub import prepared
from tests.kernels.plain import CPU, plain_weight, random_outliers, random_packed

KERNEL = Cuda()
CAPABILITIES = [(5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0)]
OWN = [of for of in CAPABILITIES if of >= (7, 5)]


def gpu(of: tuple[int, int], here: bool = False) -> Device:
    return Device(0, "a GPU", "cuda", of, torch_device="cuda:0" if here else None, hypothetical=not here)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    caches = (backend._lasting_obstacle, backend._prefetch)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("group", [16, 32, 48, 64, 96, 128, 256, 384, 768])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of", CAPABILITIES)
def test_what_it_takes(of: tuple[int, int], dtype: torch.dtype, group: int) -> None:
    reason = KERNEL.rejects(LinearSpec(768, 64, group, dtype), gpu(of))
    if of < (7, 5):
        assert reason == "it needs compute capability 7.5 or newer"
    elif dtype == torch.float64:
        assert reason == "it computes in float16 or bfloat16, not in float64"
    elif dtype == torch.bfloat16 and of < (8, 0):
        assert reason == "the tensor cores of compute capability 7.5 take float16, not bfloat16"
    elif group in (16, 48, 96):
        assert reason == f"it takes groups of 32, 64, multiples of 128 and whole rows, not of {group}"
    else:
        assert reason is None


@pytest.mark.parametrize("width", [8, 96, 100, 2048])
def test_one_scale_a_row_of_any_width(width: int) -> None:
    assert KERNEL.rejects(LinearSpec(width, 64, width), gpu((8, 6))) is None


@pytest.mark.parametrize("kind", ["cpu", "rocm", "mps"])
def test_other_devices(kind: Any) -> None:
    assert KERNEL.rejects(LinearSpec(64, 64, 32), Device(0, kind, kind)) == f"it runs on NVIDIA GPUs, not on {kind}"


def test_one_table_says_what_needs_what() -> None:
    assert [path.first for path in PATHS] == sorted(path.first for path in PATHS)
    assert (capability.MIN_CAPABILITY, capability.OWN_KERNELS) == ((6, 0), (7, 5))
    assert path_of((7, 2)).gemv is None and path_of((7, 2)).gemm is None


@pytest.mark.parametrize("of", OWN)
def test_the_table_says_what_the_launchers_do(of: tuple[int, int]) -> None:
    path, arch = path_of(of), jit.arch_of(of)
    assert ("bulk copies" in str(path.gemv)) is gemv.has_ring(arch)
    copies = ("m16n8k8", "cp.async", "bulk copies")[designs.copy_policy(arch)]
    assert copies in str(path.gemm)
    assert ("wgmma" in str(path.gemm)) is any(not design.mma for design in designs.designs(arch))
    assert ("cuBLAS" in str(path.gemm)) is designs.dequantizes(10_000, arch)
    assert path.bfloat16 is any(defines.get("AWQ_BF16") for *_, defines in designs.variants(arch))


@pytest.mark.parametrize("of", OWN)
def test_the_reason_names_kernel_architecture_and_instructions(of: tuple[int, int]) -> None:
    for version in ("GEMV", "GEMM"):
        choice = select_kernel_version(of, version=version)
        assert choice.kernel == "cuda"
        assert jit.arch_of(of) in choice.how
        assert str(path_of(of).gemv if version == "GEMV" else path_of(of).gemm) in choice.reason


def test_it_comes_before_what_needs_no_compiler() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert names.index("cuda") < names.index("portable") < names.index("reference")


SPEC = LinearSpec(64, 64, 32)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "missing", lambda: 'NVRTC is not installed: pip install "awq-int4[cu13]"')
    assert "NVRTC is not installed" in (KERNEL.rejects(SPEC, gpu((8, 6), here=True)) or "")
    assert KERNEL.rejects(SPEC, gpu((8, 6))) is None, "hardware that is not here is judged by its number alone"


@pytest.mark.parametrize(
    "error",
    [
        KernelNotSupportedError("The NVIDIA driver (for CUDA 12.4) cannot load repack.cu: update the driver."),
        ConfigError("Other users may write to the cache folder /shared: run `chmod go-w /shared`."),
    ],
)
def test_what_stands_in_the_way_is_found_before_any_weight_is_read(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = []

    def fail(*arguments: Any) -> None:
        asked.append(arguments)
        raise error

    monkeypatch.setattr(jit, "missing", lambda: None)
    monkeypatch.setattr(backend, "_smallest", lambda device: random_packed(8, 32, 32))
    monkeypatch.setattr(backend, "to_units", fail)
    for _ in range(2):
        assert KERNEL.rejects(SPEC, gpu((8, 6), here=True)) == str(error).rstrip(".")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        torch.AcceleratorError("busy"),
        KernelError("CUDA could not load repack.cu for sm_86: CUDA_ERROR_OUT_OF_MEMORY."),
    ],
)
def test_what_may_pass_is_a_reason_and_asked_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    ends: list[Exception | None] = [error, error, None, error]

    def fail(*arguments: Any) -> None:
        if end := ends.pop(0):
            raise end

    monkeypatch.setattr(jit, "missing", lambda: None)
    monkeypatch.setattr(backend, "_smallest", lambda device: random_packed(8, 32, 32))
    monkeypatch.setattr(backend, "to_units", fail)
    monkeypatch.setattr(backend, "_too_wide", lambda spec, index: None)
    first = str(error).splitlines()[0].rstrip(".")
    reasons = [KERNEL.rejects(SPEC, gpu((8, 6), here=True)) for _ in range(4)]
    assert reasons == [f"it does not run here now ({first})"] * 2 + [None] * 2


def test_a_row_too_wide_for_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_obstacle", lambda index: None)
    monkeypatch.setattr(backend, "fitting_rows", lambda index, width, *sizes: 0 if width > 20000 else 3)
    assert KERNEL.rejects(SPEC, gpu((7, 5), here=True)) is None
    assert "28672" in (KERNEL.rejects(LinearSpec(28672, 64, 128), gpu((7, 5), here=True)) or "")


def test_weights_are_stored_once_for_both_versions() -> None:
    packed = random_packed(256, 512, 128)
    weights = KERNEL.prepare(packed, None, CPU)
    assert set(weights) == {"cuda_codes", "cuda_affine"}
    assert sum(tensor.nbytes for tensor in weights.values()) <= 1.01 * packed.nbytes
    assert set(KERNEL.prepare(packed, random_outliers(packed, 3), CPU)) - set(weights) == {"cuda_kept", "cuda_index"}


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_the_group_that_the_operator_is_told(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    packed = random_packed(24, 512, group)
    linear = prepared(QuantLinear(packed))

    def dense(x: Any, codes: Any, affine: Any, kept: Any, index: Any, bias: Any, *sizes: int) -> torch.Tensor:
        return units_to_dense(cuda_units(codes, affine, kept, index, *sizes[:3]))

    cuda_units = Units
    monkeypatch.setattr(backend, "linear", dense)
    assert (linear(torch.zeros(1, 512).half()) - plain_weight(packed)).abs().max() < 1e-6


def test_compiling_starts_with_the_first_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(jit, "prefetch", lambda requests: asked.append(list(requests)))
    for _ in range(2):
        backend._prefetch((9, 0), Shape(4096, 4096, 64, 3, bf16=True))
    (requests,) = asked
    assert {arch for _, _, arch, _ in requests} == {"sm_90a"}
    assert {defines.get("GROUP", 64) for *_, defines in requests} == {64}
    assert {defines.get("AWQ_BF16", 1) for *_, defines in requests} == {1}
    assert {defines.get("KEPT", 1) for *_, defines in requests} == {1}
    assert {"gemv.cu", "repack.cu"} <= {source.name for source, *_ in requests}


def test_a_crossover_belongs_to_gpu_driver_kernels_and_shape() -> None:
    keys = {
        backend._key(spec, device)
        for device in (gpu((8, 6)), Device(0, "another", "cuda", (8, 6)))
        for spec in (
            SPEC,
            LinearSpec(64, 128, 32),
            LinearSpec(128, 64, 32),
            LinearSpec(64, 64, 64),
            LinearSpec(64, 64, 32, torch.bfloat16),
            LinearSpec(64, 64, 32, outliers=1),
        )
    }
    assert len(keys) == 12
    assert backend._key(SPEC, gpu((8, 6))) == backend._key(LinearSpec(64, 64, 32, torch.float32), gpu((8, 6)))
    assert all("driver" in key and backend._sources() in key for key in keys)


def test_where_versions_cross_without_a_gpu() -> None:
    weights = KERNEL.prepare(random_packed(64, 64, 32), None, CPU)
    assert KERNEL.gemv_rows(SPEC, CPU, weights) == KERNEL.gemv_rows(SPEC, gpu((9, 0))) == GEMV_ROWS


def test_where_versions_cross_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered counts; only with weights at hand is anything measured."""
    measured: list[str] = []

    def find(key: str, run: Any, device: Any) -> int:
        measured.append(key)
        return 5

    monkeypatch.setattr(backend.crossover, "find", find)
    monkeypatch.setattr(backend.torch, "ones", lambda *shape, **where: torch.empty(*shape, device="meta"))
    monkeypatch.setattr(backend.crossover, "recall", lambda key: None)
    assert KERNEL.gemv_rows(SPEC, gpu((9, 0), here=True)) == GEMV_ROWS
    monkeypatch.setattr(backend.crossover, "recall", lambda key: 3)
    assert KERNEL.gemv_rows(SPEC, gpu((9, 0), here=True)) == 3
    assert not measured
    assert KERNEL.gemv_rows(SPEC, gpu((9, 0), here=True), weights={}) == 5
    assert measured == [backend._key(SPEC, gpu((9, 0)))]


def test_nothing_is_allocated_for_a_crossover_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.crossover, "recall", lambda key: 3)
    monkeypatch.setattr(backend.torch, "ones", lambda *shape, **where: pytest.fail("allocated"))
    assert KERNEL.gemv_rows(SPEC, gpu((9, 0), here=True), weights={}) == 3
