"""Every CUDA kernel compiles for every architecture that the installed NVRTC knows: no GPU, and never skipped.

Without NVRTC this module fails, as it should: `pip install -e ".[cu13]"`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from awq import jit
from awq.capability import OWN_KERNELS, parse_capability
from awq.kernels.cuda import columns, designs, gemv, search, step
from awq.kernels.cuda.layout import SOURCES

# "sm_90a" for "sm_90": kernels are compiled for the exact GPU.
ARCHS = [jit.arch_of(parse_capability(arch)) for arch in jit.architectures()]
_PART = 7  # every so manieth
# In local memory: sums that do not fit into registers would take kilobytes, and time.
MOST_SPILLED = 64


def variants(arch: str) -> list[tuple[Path, str, str, dict[str, int]]]:
    rooms = gemv, designs, columns, search, step
    return [variant for room in rooms for variant in room.variants(arch)]


def described(arch: str, source: Path, defines: dict[str, int]) -> str:
    return "-".join([arch, source.stem, *(f"{name}{value}".lower() for name, value in defines.items())])


def one_a_source() -> list[Any]:
    """The first variant of each source and architecture."""
    return [
        pytest.param(source, arch, defines, id=f"{arch}-{source.stem}")
        for each in ARCHS
        for source, _, arch, defines in {variant[0]: variant for variant in reversed(variants(each))}.values()
    ]


def all_of_them() -> list[Any]:
    """Of architectures that are sm_100 to the kernels (sm_103, sm_107) a part: they take 5 minutes each."""
    alike = [arch for arch in ARCHS if arch.startswith("sm_10")][1:]
    return [
        pytest.param(source, arch, defines, id=described(arch, source, defines))
        for each in ARCHS
        for source, _, arch, defines in variants(each)[:: _PART if each in alike else 1]
    ]


def compiles(source: Path, arch: str, defines: dict[str, int]) -> None:
    compiled = jit.compile_source(source, arch, defines, verbose=True)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert "warning" not in compiled.log
    assert "serialized" not in compiled.log  # wgmma one by one: 8 % of 128 rows and more
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", compiled.log)]
    assert spilled and max(spilled) <= MOST_SPILLED


@pytest.mark.parametrize(("source", "arch", "defines"), one_a_source())
def test_every_source_for_every_architecture(source: Path, arch: str, defines: dict[str, int]) -> None:
    compiles(source, arch, defines)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch", "defines"), all_of_them())
def test_every_variant_for_every_architecture(source: Path, arch: str, defines: dict[str, int]) -> None:
    compiles(source, arch, defines)


def test_no_source_is_forgotten() -> None:
    compiled = {source for arch in ARCHS for source, *_ in variants(arch)}
    assert compiled == set(SOURCES.glob("*.cu"))
    assert all('extern "C" __global__ void' in source.read_text(encoding="utf-8") for source in compiled)


def test_variants_are_of_the_architecture_asked_for() -> None:
    for each in ARCHS:
        assert {arch for _, _, arch, _ in variants(each)} == {each}
        assert {source.stem for source, *_ in variants(each)} >= {"repack", "gemv", "gemm_mma"}
        bf16 = {defines.get("AWQ_BF16", 0) for *_, defines in variants(each)}
        assert bf16 == ({0} if each == "sm_75" else {0, 1})


def test_the_oldest_gpus_with_own_kernels_can_be_compiled_for() -> None:
    assert jit.arch_of(OWN_KERNELS) == ARCHS[0]
