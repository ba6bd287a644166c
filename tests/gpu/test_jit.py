"""Kernels compiled, loaded and launched on an NVIDIA GPU."""

import struct
import threading
from pathlib import Path

import pytest
import torch

from awq import jit
from awq.errors import AwqError, KernelError, KernelNotSupportedError

pytestmark = pytest.mark.gpu

# y[i] = x[i] * a + b[3], through a struct of 64 bytes, with `shared` floats of dynamic shared memory in between.
AXPB = """
struct Params { float* y; const float* x; float a; int n; double pad[4]; int shared; int last; };
extern "C" __device__ const int block = 128;
extern "C" __global__ void axpb(const __grid_constant__ Params p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  extern __shared__ float between[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (p.shared) between[p.shared - blockDim.x + threadIdx.x] = 0.5f;
  __syncthreads();
  if (i < p.n) p.y[i] = p.x[i] * p.a + (p.shared ? 2 * between[p.shared - 1 - threadIdx.x] : 1.0f) * p.last;
}
"""
PARAMS = struct.Struct("<QQfi4dii")
N = 1000


@pytest.fixture(autouse=True)
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "axpb.cu").write_text(AXPB)
    return tmp_path / "axpb.cu"


def own_arch() -> str:
    return jit.arch_of(torch.cuda.get_device_capability())


def launcher_of(source: Path, pdl: bool = False, shared: int = 0) -> jit.Launcher:
    kernel = jit.kernel(source, "axpb", own_arch())
    block = kernel.global_int("block")
    return kernel.launcher(-(-N // block), block, shared, PARAMS.size, pdl)


def pack(launcher: jit.Launcher, y: torch.Tensor, x: torch.Tensor, a: float, last: int, shared: int = 0) -> None:
    PARAMS.pack_into(launcher.params, 0, y.data_ptr(), x.data_ptr(), a, N, 0, 0, 0, 0, shared // 4, last)


def has_pdl() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("side", [False, True])
def test_launches_in_any_stream(source: Path, pdl: bool, side: bool) -> None:
    """The packed struct counts at the call, not later; a chain in one stream is in order."""
    if pdl and not has_pdl():
        pytest.skip("needs compute capability 9.0")
    launcher = launcher_of(source, pdl)
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        x = torch.arange(N, dtype=torch.float32, device="cuda")
        ys = [torch.full_like(x, float("nan")) for _ in range(20)]
        for step, y in enumerate(ys):
            pack(launcher, y, ys[step - 1] if step else x, 0.5, step)
            launcher(stream.cuda_stream)
            struct.pack_into("<Q", launcher.params, 0, 0)
    torch.cuda.synchronize()
    expected = x
    for step, y in enumerate(ys):
        expected = expected * 0.5 + step
        assert torch.equal(y, expected)


@pytest.mark.parametrize("pdl", [False, True])
def test_launches_in_a_graph(source: Path, pdl: bool) -> None:
    if pdl and not has_pdl():
        pytest.skip("needs compute capability 9.0")
    launcher = launcher_of(source, pdl)
    x = torch.zeros(N, device="cuda")
    y, z = torch.empty_like(x), torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        pack(launcher, y, x, 2, 3)
        launcher(stream)
        pack(launcher, z, y, -1, 1)
        launcher(stream)
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(z, torch.full_like(z, -(2 * value + 3) + 1))


def test_shared_memory_up_to_what_the_gpu_has(source: Path) -> None:
    """Launched once more with little, after another launcher raised the limit, and the other way around."""
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    x = torch.ones(N, device="cuda")
    launchers = [(shared, launcher_of(source, shared=shared)) for shared in (most, 4096, 60 * 1024, most)]
    for shared, launcher in launchers:
        y = torch.full_like(x, float("nan"))
        pack(launcher, y, x, 2, 5, shared)
        launcher(torch.cuda.current_stream().cuda_stream)
        assert torch.equal(y, torch.full_like(y, 7))
    with pytest.raises(KernelError, match=rf"give a block of axpb {most + 1024} bytes of shared memory"):
        launcher_of(source, shared=most + 1024)


def test_a_new_thread_launches_too(source: Path) -> None:
    """It has no CUDA context of its own at first, and a launch in the default stream needs one."""
    launcher = launcher_of(source)
    x = torch.ones(N, device="cuda")
    y = torch.zeros_like(x)
    pack(launcher, y, x, 4, 0)
    failed: list[AwqError] = []

    def run() -> None:
        try:
            launcher(0)
        except AwqError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert failed == [] and torch.equal(y, 4 * x)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_one_launcher_serves_two_devices(source: Path) -> None:
    if torch.cuda.get_device_capability(0) != torch.cuda.get_device_capability(1):
        pytest.skip("needs two GPUs of one kind")
    shared = 60 * 1024
    launcher = launcher_of(source, shared=shared)
    for device in (0, 1, 0):
        with torch.cuda.device(device):
            x = torch.ones(N, device="cuda")
            y = torch.zeros_like(x)
            pack(launcher, y, x, 3, 0, shared)
            launcher(torch.cuda.current_stream().cuda_stream)
            assert torch.equal(y, 3 * x)


def test_a_binary_for_another_gpu_is_told(source: Path) -> None:
    other = "sm_80" if torch.cuda.get_device_capability() < (8, 0) else "sm_75"
    with pytest.raises(
        KernelNotSupportedError, match=rf"^The NVIDIA driver .* cannot load axpb\.cu, .* for {other} \("
    ):
        jit.kernel(source, "axpb", other).launcher(1, 32, 0, PARAMS.size)


def test_a_launch_that_cannot_be_is_told(source: Path) -> None:
    launcher = jit.kernel(source, "axpb", own_arch()).launcher(1, 4096, 0, PARAMS.size)
    with pytest.raises(KernelError, match=r"^CUDA could not launch axpb: CUDA_ERROR_INVALID_VALUE, "):
        launcher(0)
    with pytest.raises(KernelError, match=r"could not find none in axpb\.cu for .*: CUDA_ERROR_NOT_FOUND"):
        jit.kernel(source, "none", own_arch())


def test_tensor_maps() -> None:
    """The driver takes one, and refuses what breaks its rules."""
    if not has_pdl():
        pytest.skip("needs compute capability 9.0")
    x = torch.zeros(33, 4096, dtype=torch.bfloat16, device="cuda")
    arguments = ((4096, 33), (8192,), (64, 32), 128, 128)
    one = jit.tensor_map(x.data_ptr(), "bfloat16", *arguments)
    assert len(one) == 128 and one != jit.tensor_map(x.data_ptr() + 64, "bfloat16", *arguments)
    with pytest.raises(KernelError, match=r"describe a tensor of bfloat16 .*INVALID_VALUE"):
        jit.tensor_map(x.data_ptr() + 2, "bfloat16", *arguments)


def test_clusters_that_run_at_once(source: Path) -> None:
    if not has_pdl():
        pytest.skip("needs compute capability 9.0")
    kernel = jit.kernel(source, "axpb", own_arch())
    count = torch.cuda.get_device_properties(0).multi_processor_count
    assert 0 < kernel.clusters(2, 128, 200 * 1024) <= count // 2


def test_the_driver_tells_its_version() -> None:
    from awq.jit.driver import driver

    major, minor = map(int, driver().version().split("."))
    assert (major, minor) >= (12, 0)
