"""Loading and launching, against a driver that keeps what it was asked: handles, structs, devices, errors."""

import ctypes
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from awq import jit
from awq.errors import KernelError, KernelNotSupportedError
from awq.jit import driver as driver_module
from awq.jit import launch, nvrtc
from awq.jit.driver import Driver
from tests.jit.fake import FakeLibrary

ARCH, SIZE = "sm_90a", {"SIZE": 4}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Stands for libcuda. Nothing is compiled either: a binary is its key's text."""
    library = FakeLibrary()
    driver = Driver(library)
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0.88")
    monkeypatch.setattr(nvrtc, "compile_text", lambda text, *rest: nvrtc.Compiled(text.encode(), ""))
    return library


@pytest.fixture
def kernel(library: FakeLibrary, source: Path) -> jit.Kernel:
    return jit.kernel(source, "scale", ARCH, SIZE)


def test_a_kernel_is_compiled_and_loaded_once(library: FakeLibrary, source: Path) -> None:
    first = jit.kernel(source, "scale", ARCH, SIZE)
    assert jit.kernel(source, "scale", ARCH, {"SIZE": 4}) is first
    assert jit.kernel(source, "other", ARCH, SIZE) is not first
    assert library.loads == 1
    assert jit.kernel(source, "scale", ARCH, {"SIZE": 5}) is not first
    assert jit.kernel(source, "scale", "sm_80", SIZE) is not first
    assert library.loads == 3


def test_structs_are_cuda_hs() -> None:
    """As written by hand: sizes, offsets and values of CUlaunchConfig and CUlaunchAttribute."""
    attribute = launch._Attribute(6, 0, (1,))
    assert bytes(attribute) == struct.pack("<i4xi60x", 6, 1)
    config = launch._config(132, 256, 4096, attribute)
    config.stream = 0x7F12_3456_7890
    words = struct.unpack("<7I4xQQI4x", bytes(config))
    assert words[:8] == (132, 1, 1, 256, 1, 1, 4096, 0x7F12_3456_7890)
    assert words[8:] == (ctypes.addressof(config.attributes.contents), 1)
    assert struct.unpack("<7I4xQQI4x", bytes(launch._config(1, 32, 0, None)))[7:] == (0, 0, 0)


@pytest.mark.parametrize("pdl", [False, True])
def test_a_launch_is_what_was_asked(library: FakeLibrary, kernel: jit.Kernel, pdl: bool) -> None:
    launcher = kernel.launcher(132, 256, 1000, 16, pdl)
    assert len(launcher.params) == 16 and bytes(launcher.params) == bytes(16)
    for stream in (0, 0x7F12_3456_7890, 0x7F12_3456_7890, 0):
        struct.pack_into("<QQ", launcher.params, 0, 1 << 63, stream)
        launcher(stream)
    assert [one["stream"] for one in library.launches] == [0, 0x7F12_3456_7890, 0x7F12_3456_7890, 0]
    for one in library.launches:
        assert one["params"] == struct.pack("<QQ", 1 << 63, one["stream"])
        assert one["address"] % 64 == 0
        assert (one["grid"], one["block"], one["shared"]) == ((132, 1, 1), (256, 1, 1), 1000)
        assert one["attributes"] == ([(6, 1)] if pdl else [])
        assert one["kernel"] == kernel.handle.value


@pytest.mark.parametrize("size", [1, 8, 64, 128, 200, 4096])
def test_parameters_are_aligned_and_their_size(library: FakeLibrary, kernel: jit.Kernel, size: int) -> None:
    launchers = [kernel.launcher(1, 32, 0, size) for _ in range(5)]
    for launcher in launchers:
        launcher.params[-1] = 1
        with pytest.raises(struct.error):
            struct.pack_into("<B", launcher.params, size, 1)
        launcher(0)
    assert {one["address"] % 64 for one in library.launches} == {0}
    assert len({one["address"] for one in library.launches}) == 5


def test_shared_memory_is_raised_and_never_lowered(library: FakeLibrary, kernel: jit.Kernel) -> None:
    for shared in (0, 60_000, 1000, 60_000, 200_000):
        kernel.launcher(1, 32, shared, 8)
    assert library.attributes == [(8, 60_000, 0), (8, 200_000, 0)]


def test_every_device_in_use_gets_its_shared_memory(library: FakeLibrary, kernel: jit.Kernel) -> None:
    library.active = {0, 1}
    library.fails["attribute 1"] = [209]  # of another architecture: no obstacle for device 0
    kernel.launcher(1, 32, 60_000, 8)
    assert sorted(library.attributes) == [(8, 60_000, 0), (8, 60_000, 1)]
    library.current = 1
    kernel.launcher(1, 32, 60_000, 8)
    assert library.attributes[2:] == [(8, 60_000, 1)]


def test_a_device_that_came_later_is_made_ready_by_its_first_launch(library: FakeLibrary, kernel: jit.Kernel) -> None:
    launcher = kernel.launcher(1, 32, 60_000, 8)
    library.current, library.active, library.fails = 1, {0, 1}, {"launch": [1]}
    launcher(0)
    assert library.attributes == [(8, 60_000, 0), (8, 60_000, 1)] and len(library.launches) == 1


def test_a_new_thread_enters_the_context_of_torchs_device(
    library: FakeLibrary, kernel: jit.Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launcher = kernel.launcher(1, 32, 60_000, 8)
    library.context, library.fails = None, {"launch": [201]}
    launcher(0)
    assert library.context == 0x7F00_0000_0002 and len(library.launches) == 1
    assert library.attributes == [(8, 60_000, 0), (8, 60_000, 1)]


def test_errors_of_the_driver_are_named(library: FakeLibrary, kernel: jit.Kernel) -> None:
    launcher = kernel.launcher(1, 32, 0, 8)
    library.fails = {"launch": [719]}
    with pytest.raises(KernelError, match=r"^CUDA could not launch scale: CUDA_ERROR_LAUNCH_FAILED, why\.$"):
        launcher(0)
    library.fails = {"launch": [1, 1]}
    with pytest.raises(KernelError, match=r"^CUDA could not launch scale: CUDA_ERROR_INVALID_VALUE, why\.$"):
        launcher(0)
    library.fails = {"launch": [12345]}
    with pytest.raises(KernelError, match=r"^CUDA could not launch scale: error 12345\.$"):
        launcher(0)
    library.fails = {"attribute 0": [1]}
    with pytest.raises(
        KernelError, match=r"could not give a block of scale 999999 bytes of shared memory: .*VALUE, why"
    ):
        kernel.launcher(1, 32, 999_999, 8)
    launcher(0)
    assert len(library.launches) == 1


@pytest.mark.parametrize("call", ["load", "find", "function"])
def test_a_driver_that_does_not_take_the_binary_is_told(library: FakeLibrary, source: Path, call: str) -> None:
    library.fails = {call: [209]}
    with pytest.raises(KernelNotSupportedError) as caught:
        jit.kernel(source, "scale", ARCH, SIZE).launcher(1, 32, 0, 8)
    assert str(caught.value) == (
        "The NVIDIA driver (for CUDA 12.4) cannot load scale.cu, compiled by NVRTC 13.0.88 for sm_90a "
        "(CUDA_ERROR_NO_BINARY_FOR_GPU, why): update the driver, or install torch and awq-int4 for an older CUDA."
    )
    jit.kernel(source, "scale", ARCH, SIZE).launcher(1, 32, 0, 8)(0)


def test_other_failures_to_load_are_named(library: FakeLibrary, source: Path) -> None:
    library.fails = {"load": [2]}
    with pytest.raises(KernelError, match=r"^CUDA could not load scale\.cu for sm_90a: CUDA_ERROR_OUT_OF_MEMORY, why"):
        jit.kernel(source, "scale", ARCH, SIZE)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(driver_module.ctypes, "CDLL", none)
    with pytest.raises(
        KernelNotSupportedError, match=r"^There is no NVIDIA driver here \(.* does not load\): install it"
    ):
        driver_module.driver.__wrapped__()
    monkeypatch.setattr(driver_module.ctypes, "CDLL", lambda name: object())
    with pytest.raises(KernelNotSupportedError, match="older than CUDA 12: update it"):
        driver_module.driver.__wrapped__()


def test_a_driver_that_does_not_start_is_told() -> None:
    library = FakeLibrary()
    library.fails = {"init": [2]}
    with pytest.raises(KernelError, match=r"^CUDA could not start: CUDA_ERROR_OUT_OF_MEMORY, why\.$"):
        Driver(library)


def test_clusters(library: FakeLibrary, kernel: jit.Kernel) -> None:
    assert kernel.clusters(2, 384, 200_000) == 66
    assert library.launches == [{"cluster": (4, 2, 1, 1), "shared": 200_000}]
    assert library.attributes == [(8, 200_000, 0)]


def test_tensor_maps(library: FakeLibrary) -> None:
    made = jit.tensor_map(0x7F12_3456_7800, "bfloat16", (4096, 33), (8192,), (64, 32), 128, 256)
    assert made == b"\xab" * 128
    (kind, rank, pointer, *arrays, interleave, swizzle, promotion, fill), *_ = library.maps
    assert (kind, rank, pointer.value) == (9, 2, 0x7F12_3456_7800)
    assert arrays == [[4096, 33], [8192], [64, 32], [1, 1]]
    assert (interleave, swizzle, promotion, fill) == (0, 3, 3, 0)
    jit.tensor_map(0x1000, "float16", (64, 8, 4), (128, 1024), (64, 8, 1), 0, 0)
    assert library.maps[1][:2] == (6, 3) and library.maps[1][-4:] == (0, 0, 0, 0)
    library.fails = {"map": [1]}
    with pytest.raises(
        KernelError, match=r"describe a tensor of uint8 \(7,\), strides \(\), box \(7,\): CUDA_ERROR_INV"
    ):
        jit.tensor_map(16, "uint8", (7,), (), (7,), 0, 0)
    with pytest.raises(KernelError, match="2 dims takes 1 strides"):
        jit.tensor_map(16, "uint8", (7, 8), (16, 16), (7, 1), 0, 0)


def test_programmatic_launches_are_switched_in_one_thread() -> None:
    assert jit.programmatic() is True
    with jit.programmatic(False):
        assert jit.programmatic() is False
        with jit.programmatic(True):
            assert jit.programmatic() is True
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(jit.programmatic).result() is True
    assert jit.programmatic() is True


class Compiler:
    """Stands for NVRTC: waits until it is let go, and counts."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.started, self.go = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def __call__(self, text: str, name: str, arch: str, defines: dict[str, int]) -> nvrtc.Compiled:
        self.sources.append(f"{name} {arch} {defines}")
        self.started.set()
        assert self.go.wait(30)
        if self.error:
            raise self.error
        return nvrtc.Compiled(text.encode(), "")


@pytest.fixture
def compiler(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(nvrtc, "compile_text", compiler)
    return compiler


def test_a_kernel_joins_its_running_prefetch(library: FakeLibrary, source: Path, compiler: Compiler) -> None:
    jit.prefetch([(source, "scale", ARCH, SIZE), (source, "other", ARCH, SIZE)])
    assert compiler.started.wait(30)
    jit.prefetch([(source, "scale", ARCH, SIZE)])
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(jit.kernel, source, "scale", ARCH, SIZE) for _ in range(4)]
        compiler.go.set()
        kernels = {future.result(30) for future in futures}
    assert len(kernels) == 1 and len(compiler.sources) == 1 and library.loads == 1
    jit.prefetch([(source, "scale", ARCH, SIZE)])
    assert len(compiler.sources) == 1


def test_a_kernel_does_not_queue_behind_others(
    source: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one thread at work on another, it compiles its own."""
    monkeypatch.setattr(jit, "_WORKERS", 1)
    jit.prefetch([(source, "scale", ARCH, {"SIZE": size}) for size in (1, 2)])
    assert compiler.started.wait(30)
    compiler.started.clear()
    with ThreadPoolExecutor(1) as pool:
        wanted = pool.submit(jit.kernel, source, "scale", ARCH, {"SIZE": 2})
        assert compiler.started.wait(30)
        assert len(compiler.sources) == 2 and "'SIZE': 2" in compiler.sources[1]
        compiler.go.set()
        assert wanted.result(30) is jit.kernel(source, "scale", ARCH, {"SIZE": 2})
    jit.kernel(source, "scale", ARCH, {"SIZE": 1})
    assert len(compiler.sources) == 2


def test_what_failed_in_a_prefetch_is_raised_by_its_kernel(source: Path, compiler: Compiler) -> None:
    compiler.error = KernelError("bad source")
    compiler.go.set()
    jit.prefetch([(source, "scale", ARCH, SIZE)])
    with pytest.raises(KernelError, match="bad source"):
        jit.kernel(source, "scale", ARCH, SIZE)
    compiler.error = None
    assert jit.kernel(source, "scale", ARCH, SIZE).name == "scale"


def test_threads_that_ask_together_compile_once(library: FakeLibrary, source: Path, compiler: Compiler) -> None:
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(jit.kernel, source, "scale", ARCH, SIZE) for _ in range(8)]
        assert compiler.started.wait(30)
        compiler.go.set()
        assert len({future.result(30) for future in futures}) == 1
    assert len(compiler.sources) == 1 and library.loads == 1
