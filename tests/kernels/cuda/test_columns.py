import pytest
import torch

from awq import jit
from awq.jit.launch import constant
from awq.kernels.cuda import columns
from awq.kernels.cuda.layout import SOURCES


def test_the_launch_and_the_source_agree_on_the_most_columns() -> None:
    cubin = jit.compile_cubin(SOURCES / "column_loop.cu", "sm_90a", {})
    assert constant(cubin, "most_columns") == columns.COLUMNS


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_only_nvidia_gpus_have_the_kernel(device: str) -> None:
    assert columns.obstacle(torch.device(device)) == f"it runs on NVIDIA GPUs, not on {device}"
