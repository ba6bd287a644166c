"""CUDA compute capabilities: what users write, which GPUs they mean, and what this package needs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from awq.errors import ConfigError

Capability = tuple[int, int]


@dataclass(frozen=True)
class KernelPath:
    """What the linears of GPUs from one compute capability on are run by.

    gemv, gemm: the instructions that the own kernel of each version is built on; None: torch's own operators do the
                work, where the installed torch has code for the GPU
    bfloat16:   whether the tensor cores take it
    """

    first: Capability
    gemv: str | None
    gemm: str | None
    bfloat16: bool


# The one table of what needs what.
PATHS: tuple[KernelPath, ...] = (
    KernelPath((6, 0), None, None, bfloat16=False),
    KernelPath((7, 5), "int8 mma.sync m8n8k16", "mma.sync m16n8k8, for many rows cuBLAS", bfloat16=False),
    KernelPath((8, 0), "int8 mma.sync m16n8k32", "mma.sync m16n8k16 and cp.async, for many rows cuBLAS", bfloat16=True),
    KernelPath(
        (9, 0), "int8 mma.sync and bulk copies", "mma.sync, for many rows wgmma, and bulk copies", bfloat16=True
    ),
    KernelPath(
        (10, 0), "int8 mma.sync and bulk copies", "mma.sync and bulk copies, for many rows cuBLAS", bfloat16=True
    ),
    # the shared memory of an RTX card's block is too small for the GEMV's ring of copies
    KernelPath((11, 0), "int8 mma.sync m16n8k32", "mma.sync and bulk copies, for many rows cuBLAS", bfloat16=True),
)
# Below MIN_CAPABILITY nothing runs; own kernels start at OWN_KERNELS.
MIN_CAPABILITY: Capability = PATHS[0].first
OWN_KERNELS: Capability = next(path.first for path in PATHS if path.gemv)

# First compute capability of each series, ascending: users mix these up, so messages name both.
SERIES: tuple[tuple[Capability, str], ...] = (
    ((1, 0), "Tesla"),
    ((2, 0), "Fermi, GeForce GTX 400 and 500"),
    ((3, 0), "Kepler, GeForce GTX 600 and 700, Tesla K"),
    ((5, 0), "Maxwell, GeForce GTX 900, Tesla M"),
    ((6, 0), "Pascal, GeForce GTX 1000, Tesla P"),
    ((7, 0), "Volta, V100"),
    ((7, 5), "Turing, GeForce RTX 20 and GTX 16, T4"),
    ((8, 0), "Ampere, A100"),
    ((8, 6), "Ampere, GeForce RTX 30, A10"),
    ((8, 7), "Ampere, Jetson Orin"),
    ((8, 9), "Ada, GeForce RTX 40, L4"),
    ((9, 0), "Hopper, H100 and H200"),
    ((10, 0), "Blackwell, B200 and B300"),
    ((11, 0), "Blackwell, Jetson Thor"),
    ((12, 0), "Blackwell, GeForce RTX 50"),
    ((13, 0), "newer than this package"),
)


def show(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def series(capability: Capability) -> str:
    """The architecture and the names on the box: (8, 6) is "Ampere, GeForce RTX 30, A10"."""
    return [name for first, name in SERIES if first <= capability][-1]


def path_of(capability: Capability) -> KernelPath:
    """The row of PATHS that a GPU of MIN_CAPABILITY or newer falls under."""
    return [path for path in PATHS if path.first <= capability][-1]


def parse_capability(value: object) -> Capability:
    """(8, 6) for (8, 6), "8.6", 8.6, "sm_86", "86" or 86; ConfigError for anything else."""
    parsed = _capability_pair(value) if isinstance(value, (tuple, list)) else _capability_text(value)
    if parsed is None or not (1 <= parsed[0] <= 99 and 0 <= parsed[1] <= 9):
        raise ConfigError(f"{value!r} is no compute capability: write it as (8, 6) or '8.6'.")
    return parsed


def known_capability(value: object) -> Capability | None:
    """The same, with None for what a tool prints when it does not know ("[N/A]")."""
    try:
        return parse_capability(value)
    except ConfigError:
        return None


def _capability_pair(value: tuple[Any, ...] | list[Any]) -> Capability | None:
    if len(value) == 2 and all(isinstance(part, int) and not isinstance(part, bool) for part in value):
        return value[0], value[1]
    return None


def _capability_text(value: object) -> Capability | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = str(value).strip().lower()
    if found := re.fullmatch(r"(\d+)\.(\d)", text):
        return int(found[1]), int(found[2])
    if found := re.fullmatch(r"(?:sm_?|compute_?)(\d+)(\d)[af]?", text):
        return int(found[1]), int(found[2])
    if re.fullmatch(r"\d{1,3}", text):  # 86 is 8.6 and 120 is 12.0, but 8 and 12 are major numbers
        number = int(text)
        return divmod(number, 10) if number >= 20 else (number, 0)
    return None
