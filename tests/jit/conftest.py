"""Every test here has a cache folder of its own, and a process that has compiled nothing yet."""

from pathlib import Path

import pytest

from awq import jit
from awq.jit import nvrtc

KERNEL = """
struct Params { float* y; float a; };
extern "C" __device__ const int smem_bytes = 1024 * SIZE;
extern "C" __global__ void scale(const __grid_constant__ Params p) {
  p.y[blockIdx.x * blockDim.x + threadIdx.x] *= p.a;
}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, not there yet."""
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "cache"))
    for known in ("_running", "_libraries", "_kernels"):
        monkeypatch.setattr(jit, known, {})
    for function in (nvrtc.missing, nvrtc.version, jit.cache._warn_of, jit.cache._private):
        function.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A CUDA C++ file with one kernel, `scale`, that takes the macro SIZE."""
    file = tmp_path / "scale.cu"
    file.write_text(KERNEL)
    return file


@pytest.fixture
def nvrtc_installed() -> None:
    """Skips where nothing can be compiled."""
    if reason := nvrtc.missing():
        pytest.skip(reason)
