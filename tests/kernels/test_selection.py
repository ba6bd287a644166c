"""Which version and which kernel, on simulated hardware."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from awq import kernels
from awq.capability import OWN_KERNELS
from awq.errors import AwqError, ConfigError, KernelNotSupportedError
from awq.hardware import Device, describe
from awq.kernels import KERNELS, Choice, Kernel, LinearSpec, pinned_version, select, select_kernel_version
from awq.kernels.cuda import backend
from awq.kernels.portable import Portable

SPEC = LinearSpec(64, 64, 32)
RTX_3090 = Device(0, "NVIDIA GeForce RTX 3090", "cuda", (8, 6), 24 << 30, "GPU-1", None, "cuda:0")
GTX_1080 = Device(1, "NVIDIA GeForce GTX 1080", "cuda", (6, 1), 8 << 30, "GPU-2", None, "cuda:1")
GTX_980 = Device(2, "NVIDIA GeForce GTX 980", "cuda", (5, 2), 4 << 30, "GPU-3", None, "cuda:2")
MI300 = Device(0, "AMD Instinct MI300X", "rocm", torch_device="cuda:0")
APPLE = Device(0, "Apple GPU", "mps", torch_device="mps")
BARE_CPU = Device(0, "CPU (AVX512)", "cpu", torch_device="cpu")


def simulate_compiler(monkeypatch: pytest.MonkeyPatch, obstacle: str | None = None) -> None:
    """Whether the CUDA kernels run on the GPUs that these tests make up, of which nothing is measured."""
    monkeypatch.setattr(backend, "_obstacle", lambda index: obstacle)
    monkeypatch.setattr(backend, "fitting_rows", lambda *sizes: 8)
    monkeypatch.setattr(backend.crossover, "recall", lambda key: None)


@pytest.fixture(autouse=True)
def _torch_for_turing_and_newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"])
    simulate_compiler(monkeypatch)
    kernels._say_once.cache_clear()
    yield
    kernels._say_once.cache_clear()


@pytest.mark.parametrize(
    "capability", [(6, 0), "6.1", (7, 0), 7.2, "7.5", (8, 0), "8.6", (8, 9), "sm_90", "10.0", (12, 0)]
)
@pytest.mark.parametrize(("rows", "version"), [(0, "GEMV"), (1, "GEMV"), (8, "GEMV"), (9, "GEMM"), (4096, "GEMM")])
def test_few_rows_gemv_many_rows_gemm(capability: object, rows: int, version: str) -> None:
    choice = select_kernel_version(capability, rows=rows)
    assert choice.version == version
    assert version in choice.reason and "8 rows" in choice.reason
    assert list(choice.refused) == ["GEMM" if version == "GEMV" else "GEMV"]


@pytest.mark.parametrize("version", ["GEMV", "gemm", None])
@pytest.mark.parametrize(
    ("capability", "word"), [("3.5", "Kepler"), ("5.0", "Maxwell"), ((5, 2), "GTX 900"), ("2.1", "Fermi")]
)
def test_a_capability_that_nothing_runs_on(capability: object, word: str, version: str | None) -> None:
    with pytest.raises(KernelNotSupportedError) as caught:
        select_kernel_version(capability, version=version)
    text = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert text.startswith("Kernel version not supported on this hardware")
    assert word in text and "6.0" in text and "device='cpu'" in text
    assert (version or "GEMM and GEMV").upper().replace(" AND ", " and ") in text


def test_the_error_names_the_gpu_and_its_capability() -> None:
    with pytest.raises(KernelNotSupportedError, match=r"NVIDIA GeForce GTX 980 \(compute capability 5\.2: Maxwell"):
        select_kernel_version(device=GTX_980)


def test_torchs_own_code_decides_for_a_real_pascal_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelNotSupportedError, match=r"GTX 1080.* 6.1.* sm_61 .*sm_75, sm_80"):
        select_kernel_version(device=GTX_1080, version="GEMV")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", "sm_80"])
    assert select_kernel_version(device=GTX_1080).version == "GEMV"


def test_mixed_gpus_are_judged_each_on_its_own() -> None:
    assert select_kernel_version(device=RTX_3090).version == "GEMV"
    for device in (GTX_1080, GTX_980):
        with pytest.raises(KernelNotSupportedError):
            select_kernel_version(device=device)


@pytest.mark.parametrize("device", [RTX_3090, MI300, APPLE, BARE_CPU], ids=lambda device: device.kind)
def test_both_versions_run_and_the_reason_says_how(device: Device) -> None:
    for version in ("GEMM", "GEMV"):
        choice = select_kernel_version(version=version, device=device)
        kernel = next(kernel for kernel in KERNELS if kernel.name == choice.kernel)
        assert choice.version == version
        assert device.name in choice.reason and kernel.how(version, device) in choice.reason
        assert choice.kernel == {"cuda": "cuda", "cpu": choice.kernel}.get(device.kind, "portable")


def test_on_a_cpu_the_versions_differ() -> None:
    if select(SPEC, "cpu").kernel.name != "cpu":
        pytest.skip("torch has no fast int4 kernel here")
    one, many = select_kernel_version(device="cpu"), select_kernel_version(device="cpu", rows=512)
    assert (one.version, many.version) == ("GEMV", "GEMM")
    assert "int4 CPU kernel" in one.reason and "dequantizing to bf16" in many.reason


@pytest.mark.parametrize(
    ("asked", "version", "notice"),
    [
        ("GEMM", "GEMM", False),
        ("gemv", "GEMV", True),
        ("marlin", "GEMM", True),
        ("GEMV_fast", "GEMV", True),
    ],
)
def test_an_explicit_version_is_taken_for_any_rows(asked: str, version: str, notice: bool) -> None:
    for rows in (1, 1000):
        choice = select_kernel_version((8, 6), rows=rows, version=asked)
        assert choice.version == version and "as asked" in choice.reason
        assert (repr(asked) in choice.reason) is notice


@pytest.mark.parametrize(
    ("asked", "version"), [("marlin", "GEMM"), ("GEMV_fast", "GEMV"), ("gemv-fast", "GEMV"), ("gemvfast", "GEMV")]
)
def test_the_name_of_another_version_is_said(asked: str, version: str) -> None:
    with pytest.warns(UserWarning, match=f"version '{asked}' means {version} here"):
        assert pinned_version(asked, notice=True) == version


@pytest.mark.parametrize("asked", [None, "auto", "GEMM", "gemm", "GEMV", "Gemv"])
def test_nothing_is_said_of_a_versions_own_name(asked: str | None, recwarn: pytest.WarningsRecorder) -> None:
    pinned_version(asked, notice=True)
    pinned_version("marlin")  # once a load, not once a layer
    assert not recwarn.list


def test_auto_means_by_rows() -> None:
    assert select_kernel_version((8, 6), version="auto") == select_kernel_version((8, 6))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"version": "GEMX"}, "unknown kernel version 'GEMX'"),
        ({"version": 3}, "unknown kernel version 3"),
        ({"rows": -1}, "rows=-1"),
        ({"capability": "fast"}, "'fast' is no compute capability"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"kernel": "triton"}, "unknown kernel 'triton': the kernels are cpu, cuda, portable, reference"),
    ],
)
def test_values_that_mean_nothing(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        select_kernel_version(**arguments)  # type: ignore[arg-type]


def test_a_gpu_that_torch_cannot_use() -> None:
    """A card that the driver shows to a CPU build of torch: what it could run, and what is missing."""
    idle = Device(0, RTX_3090.name, "cuda", (8, 6))
    assert "install a CUDA build" in select_kernel_version(device=idle).reason
    assert "install" not in select_kernel_version(device=RTX_3090).reason


def test_the_cpu_says_that_a_gpu_lies_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "detect", lambda: [Device(0, RTX_3090.name, "cuda", (8, 6))])
    assert "cannot use the NVIDIA GeForce RTX 3090" in select_kernel_version(device="cpu").reason


def test_select_gives_the_first_kernel_and_why_not_the_others() -> None:
    choice = select(SPEC, RTX_3090)
    assert (choice.kernel.name, choice.version, list(choice.refused)) == ("cuda", None, ["cpu"])
    assert choice.refused["cpu"] == "it runs on the CPU, not on cuda"
    assert choice.reason.startswith("cuda: GEMM by an own int4 CUDA kernel for sm_86")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_select_takes_the_named_kernel(kernel: Kernel) -> None:
    if reason := kernel.rejects(SPEC, describe("cpu")):
        pytest.skip(reason)
    assert select(SPEC, "cpu", kernel=kernel.name).kernel is kernel


def test_the_named_kernel_does_not_run_there() -> None:
    with pytest.raises(KernelNotSupportedError, match=r"not supported.*'cpu': it runs on the CPU, not on cuda"):
        select(SPEC, RTX_3090, kernel="cpu")


class GemvOnly(Portable):
    name = "gemv_only"
    versions = {"GEMV": "a test"}  # noqa: RUF012


class Nothing(Portable):
    name = "nothing"

    def rejects(self, spec: LinearSpec, device: Device) -> str | None:
        return f"it takes no {spec.in_features} inputs"


def test_adding_a_kernel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", (Nothing(), GemvOnly(), *KERNELS))
    pinned = select(SPEC, RTX_3090, version="GEMV")
    assert pinned.kernel.name == "gemv_only"
    assert pinned.refused == {"nothing": "it takes no 64 inputs"}
    by_rows = select(SPEC, RTX_3090)
    assert by_rows.kernel.name == "cuda"
    assert by_rows.refused["gemv_only"] == "it has no GEMM"


def test_every_reason_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", (Nothing(), GemvOnly()))
    with pytest.raises(
        KernelNotSupportedError, match="'nothing': it takes no 64 inputs; kernel 'gemv_only': it has no GEMM"
    ):
        select(SPEC, RTX_3090, version="gemm")


def test_the_slower_kernel_on_a_cpu_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "awq"):
        for _ in range(3):
            assert select(LinearSpec(64, 64, 16), "cpu").kernel.name == "portable"
            select(LinearSpec(64, 64, 16), "cpu", kernel="portable")
    (record,) = caplog.records
    assert "slower 'portable' kernel" in record.message and "into which 16 does not split" in record.message


def test_why_the_cuda_kernel_does_not_run_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate_compiler(monkeypatch, "NVRTC is not installed")
    with caplog.at_level(logging.WARNING, "awq"):
        for _ in range(3):
            assert select(SPEC, RTX_3090).kernel.name == "portable"
            select(SPEC, RTX_3090, kernel="portable")
    (record,) = caplog.records
    assert record.message == "linears run on the slower 'portable' kernel, since NVRTC is not installed"
    assert "('cuda' does not run: NVRTC is not installed)" in select_kernel_version(device=RTX_3090).how
    with pytest.raises(KernelNotSupportedError, match="kernel 'cuda': NVRTC is not installed"):
        select(SPEC, RTX_3090, kernel="cuda")


def test_a_pascal_gpu_is_not_told_that_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was never meant to run the CUDA kernel; who asks is told."""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", "sm_80"])
    assert select(SPEC, GTX_1080).kernel.name == "portable"
    assert f"needs compute capability {'.'.join(map(str, OWN_KERNELS))}" in select_kernel_version(device=GTX_1080).how
    assert not caplog.records


def test_a_choice_is_a_value() -> None:
    assert isinstance(select(SPEC, "cpu"), Choice)
    assert select(SPEC, "cpu") == select(SPEC, "cpu")
    assert issubclass(KernelNotSupportedError, AwqError)
