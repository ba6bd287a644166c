"""Own kernels for NVIDIA GPUs: CUDA C++ in src/, compiled for the GPU at hand at first use."""

from awq.kernels.cuda.backend import Cuda

__all__ = ["Cuda"]
