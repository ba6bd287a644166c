from types import SimpleNamespace

import pytest
import torch

from awq import jit
from awq.bench.kernels import ceiling


@pytest.mark.parametrize(("shared", "ring"), [(232448, 5), (101376, 3), (49152, 1), (0, 1)])
def test_the_ring_fits_into_shared_memory(shared: int, ring: int) -> None:
    assert ceiling.defines(SimpleNamespace(shared_memory_per_block_optin=shared)) == {"RING": ring}


@pytest.mark.slow
def test_the_kernel_compiles_for_every_architecture() -> None:
    known = jit.architectures()
    assert known
    for number in (int(name.removeprefix("sm_")) for name in known):
        arch = jit.arch_of((number // 10, number % 10))
        compiled = jit.compile_source(ceiling.SOURCE, arch, {"RING": 3}, verbose=True)
        assert compiled.cubin.startswith(b"\x7fELF"), arch
        assert "warning" not in compiled.log, arch
        assert "spill" not in compiled.log.replace("0 bytes spill stores, 0 bytes spill loads", ""), arch


@pytest.mark.gpu
def test_the_ceiling_is_below_what_the_memory_can_do() -> None:
    device = torch.device("cuda", 0)
    from awq.hardware import describe

    datasheet = describe(device).bandwidth_gbs
    found = ceiling.read_ceiling(device)
    assert found > 50
    assert datasheet is None or 0.5 * datasheet < found < 1.05 * datasheet
