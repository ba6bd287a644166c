"""The designs of the GEMM kernels, and which architecture has which.

src/gemm_mma.cu serves few rows, and all rows where there is no wgmma; src/gemm_wgmma.cu the rest on sm_90a.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from awq.kernels.cuda.layout import GROUPS, SOURCES, TILE_ROWS, UNIT_K

_BARRIER_BYTES = 128


@dataclass(frozen=True)
class Design:
    """One build of a kernel. The sources' heads say what each number means.

    kernel:     "gemm_mma" or "gemm_wgmma"
    row_groups: warps (mma) or warpgroups (wgmma) side by side; k_groups of them share the k of a stage
    blocks:     16 (mma) or 64 (wgmma) weight rows each, so many times
    """

    name: str
    kernel: str
    tokens: int
    row_groups: int
    k_groups: int
    blocks: int
    slices: int
    stages: int
    copy: int = 2
    scale_sums: bool = True
    cluster: int = 1
    ahead: bool = False
    tensor_store: bool = False
    move_registers: bool = False

    @property
    def mma(self) -> bool:
        return self.kernel == "gemm_mma"

    @property
    def block_rows(self) -> int:
        return (16 if self.mma else 64) * self.row_groups * self.blocks

    @property
    def step_k(self) -> int:
        """k of one step of the walk, the least that stream-K hands out."""
        return 64 * (self.slices if self.mma else max(2, self.slices))

    @property
    def threads(self) -> int:
        consumers = self.row_groups * self.k_groups
        if self.mma:
            return 32 * (consumers + (0, 4, 1)[self.copy])
        return 128 * consumers + (128 if self.move_registers else 32)

    @property
    def flags(self) -> int:
        """How many threads of a block's own hand over a part each of a split tile."""
        return self.row_groups * (self.k_groups if self.mma else 1)

    def shared(self, group: int) -> int:
        """Bytes of shared memory of a block, without the kept channels of x."""
        tiles = self.block_rows // TILE_ROWS
        stage = self.slices * (self.tokens * 128 + tiles * 512)
        ring = self.stages * (stage + tiles * 40 * UNIT_K // group)
        if self.mma:
            handed = self.blocks - self.blocks // self.k_groups
            return ring + self.row_groups * self.k_groups * handed * self.tokens * 64 + _BARRIER_BYTES
        consumers, chunk = self.row_groups * self.k_groups, min(32, self.tokens) * 144
        exchanged = (self.k_groups - 1) * self.row_groups * self.tokens * 256
        results = self.block_rows * self.tokens * 2 if self.tensor_store else max(consumers * chunk, exchanged)
        return -(-ring // 1024) * 1024 + results + _BARRIER_BYTES

    def fitted(self, group: int, limit: int) -> Design:
        """This design with as many stages as `limit` bytes of shared memory take."""
        return self if self.shared(group) <= limit else replace(self, stages=self.stages - 1).fitted(group, limit)

    def kept_room(self, steps: int, group: int, limit: int) -> int:
        """k16 steps of kept channels that fit beside, at most `steps`: mma keeps their x in shared memory."""
        if not self.mma or not steps:
            return 0
        free = limit - self.shared(group)
        room = min(steps, (free // self.tokens - 16) // 32)
        return room if room == steps or room < 4 else room // 4 * 4  # whole stages

    def kept_each(self, room: int) -> int:
        """k16 steps of kept channels in one step of the walk."""
        return min(4, room) if self.mma else 4

    def kept_bytes(self, room: int) -> int:
        return self.tokens * (32 * room + 16) if room else 0

    def defines(self, group: int, bf16: bool) -> dict[str, int]:
        common = {
            "GROUP": group,
            "AWQ_BF16": int(bf16),
            "TOKENS": self.tokens,
            "SLICES": self.slices,
            "STAGES": self.stages,
            "SHARED_BYTES": self.shared(group),
        }
        if self.mma:
            return common | {
                "ROW_WARPS": self.row_groups,
                "K_WARPS": self.k_groups,
                "WARP_TILES": self.blocks,
                "SCALE_SUMS": int(self.scale_sums),
                "COPY": self.copy,
            }
        return common | {
            "ROW_GROUPS": self.row_groups,
            "K_GROUPS": self.k_groups,
            "ROW_BLOCKS": self.blocks,
            "CLUSTER": self.cluster,
            "CONVERT_AHEAD": int(self.ahead),
            "TENSOR_STORE": int(self.tensor_store),
            "MOVE_REGISTERS": int(self.move_registers),
        }


# Weight rows x tokens of a tile, as measured on an H200 over six shapes of 7B and 70B models. P: one block of 8 warps
# at 16 tokens, 13 % over the best wgmma design; Q where a tile's sums are few beside its weights.
_P = Design("P 128x16", "gemm_mma", 16, 4, 2, 2, 4, 4)
_Q = Design("Q 256x16", "gemm_mma", 16, 4, 2, 4, 4, 3)
_R = Design("R 128x32", "gemm_mma", 32, 4, 2, 2, 4, 4)
_S = Design("S 128x64", "gemm_mma", 64, 4, 2, 2, 4, 3, scale_sums=False)
_A = Design("A 128x32", "gemm_wgmma", 32, 2, 2, 1, 4, 4)
_B = Design("B 256x32", "gemm_wgmma", 32, 4, 1, 1, 4, 4)
_C = Design("C 128x64", "gemm_wgmma", 64, 2, 2, 1, 4, 3, ahead=True, move_registers=True)
_D = Design("D 128x64", "gemm_wgmma", 64, 2, 1, 1, 2, 5)
_E = Design("E 256x64", "gemm_wgmma", 64, 2, 1, 2, 2, 6)
_F = Design("F 128x128", "gemm_wgmma", 128, 2, 1, 1, 2, 4)
_G = Design("G 128x256", "gemm_wgmma", 256, 2, 1, 1, 1, 4, ahead=True, tensor_store=True, move_registers=True)
_H = replace(_G, name="H 128x256 in pairs", cluster=2)
WGMMA = (_A, _B, _C, _D, _E, _F, _G, _H)

# The mma designs by a block's shared memory in bytes: an architecture's, from `shared_limit`. Short of it, rings are
# shorter and, at 64 tokens, stages too. sm_75 has two stages without a ring.
_MMA = {
    227 * 1024: (_P, _Q, _R, _S),
    163 * 1024: (_P, _R, replace(_S, slices=2, stages=4)),
    99 * 1024: (replace(_P, stages=3), replace(_R, stages=2), replace(_S, slices=2, stages=2)),
    64 * 1024: (replace(_P, stages=2), replace(_R, slices=2, stages=2)),
}


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that a block may have."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number < 80:
        return 64 * 1024
    if number in (80, 87):
        return 163 * 1024
    return 99 * 1024 if number in (86, 88, 89) or number >= 120 else 227 * 1024


def copy_policy(arch: str) -> int:
    """How the mma kernel fills its stages: 2 tensor copies, 1 cp.async, 0 plain loads."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    return 2 if number >= 90 else 1 if number >= 80 else 0


@lru_cache
def designs(arch: str) -> tuple[Design, ...]:
    """Every design that may run on `arch`: with wgmma, mma.sync serves up to 16 rows only."""
    mma = tuple(replace(design, copy=copy_policy(arch)) for design in _MMA[shared_limit(arch)])
    return tuple(design for design in mma if design.tokens == 16) + WGMMA if arch == "sm_90a" else mma


def dequantizes(rows: int, arch: str) -> bool:
    """Whether so many rows go to torch with a dequantized weight: where each weight would be converted 8 times or more.

    By arithmetic, not measured: writing and reading a dequantized weight costs an A100, as most GPUs, as much as some
    200 rows of the product, and mma.sync that converts on its way reaches two thirds of what it does without.
    """
    return arch != "sm_90a" and rows >= 8 * max(design.tokens for design in designs(arch))


def variants(arch: str) -> Iterator[tuple[Path, str, str, dict[str, int]]]:
    """Every (source, kernel, arch, defines) that can be asked for on `arch`."""
    wgmma = arch == "sm_90a"
    if wgmma:
        yield SOURCES / "gather.cu", "gather", arch, {}
    for group in GROUPS:
        for bf16 in (False, True) if arch != "sm_75" else (False,):
            if not wgmma:
                yield SOURCES / "dequantize.cu", "dequantize", arch, {"GROUP": group, "AWQ_BF16": int(bf16)}
            for design in designs(arch):
                defines = design.fitted(group, shared_limit(arch)).defines(group, bf16)
                yield SOURCES / f"{design.kernel}.cu", design.kernel, arch, defines
