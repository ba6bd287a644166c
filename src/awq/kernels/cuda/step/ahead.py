"""What kernels of a decode step ask for on behalf of those behind them, into the second-level cache: src/ahead.cuh."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from awq.kernels.cuda.layout import UNIT_BYTES, Units

# struct Ahead: codes, affine, kept; tiles, paired, units, record, steps, blocks, first, count.
PARAMS = "3Q8i"
# struct CacheAhead: keys, values, slot, first; rows, key_heads, capacity, token, window, most.
CACHE_PARAMS = "4Q6i"
# What packs them: tensors stand for their addresses.
Values = tuple[Tensor | int | None, ...]

_MIB = 1 << 20
# Bytes of every weight that kernels ask for, one part behind the other; "cache": keys and values of a layer. A kernel
# asks for its own as its ring fills, for others' when all of its own is under way. 0: for none.
AHEAD: dict[str, dict[str, int]] = {
    "qkv": {"down": 8 * _MIB, "qkv": 4 * _MIB},
    "cache": {"qkv": 20 * _MIB},
    "output": {"qkv": 10 * _MIB},
    "gate_up": {"attention": 0, "output": 8 * _MIB, "gate_up": 4 * _MIB},
    "down": {"gate_up": 8 * _MIB, "down": 4 * _MIB},
}


@dataclass(frozen=True)
class Ahead:
    """`count` bytes of a weight behind the first `first`, of every block that reads it alike.

    paired: a block takes tiles of both halves in turn, as `gated` does
    """

    units: Units
    paired: bool
    first: int
    count: int

    def values(self, multiprocessors: int) -> Values:
        """Those of PARAMS: whole units of each block."""
        codes, affine, kept = self.units.codes, self.units.affine, self.units.kept
        (tiles, units, _), record = codes.shape, affine.shape[2]
        tiles = tiles // 2 if self.paired else tiles
        blocks = min(multiprocessors, tiles)
        first, end = (place // (blocks * (UNIT_BYTES + record)) for place in (self.first, self.first + self.count))
        steps = 0 if kept is None else kept[0].nbytes
        return codes, affine, kept, tiles, int(self.paired), units, record, steps, blocks, first, end - first


def ahead(by: str, of: str, units: Units | None) -> Ahead | None:
    """What the kernel `by` asks for of the weight of kernel `of`; None: of nothing."""
    shares = AHEAD[of]
    if units is None or not shares.get(by):
        return None
    before = list(shares)[: list(shares).index(by)]
    return Ahead(units, of == "gate_up", sum(shares[name] for name in before), shares[by])


# Of its own weight, and of a later kernel's.
Asked = tuple[Ahead | None, Ahead | None]
NOTHING: Asked = (None, None)


def asked(by: str, own: Units, of: str, units: Units | None) -> Asked:
    """What the kernel `by` asks for: of its own weight, and of that of kernel `of`."""
    return ahead(by, by, own), ahead(by, of, units)


def values_of(part: Ahead | None, multiprocessors: int) -> Values:
    """Those of PARAMS, also of nothing."""
    return part.values(multiprocessors) if part else (*[None] * 3, *[0] * 8)


def cache_values(keys: Tensor, values: Tensor, slot: Tensor, first: Tensor, window: int | None) -> Values:
    """Those of CACHE_PARAMS. The arguments are those of `attention`."""
    rows, heads, capacity, head_dim = keys.shape
    token = head_dim * keys.element_size()
    most = AHEAD["cache"]["qkv"] // (2 * rows * heads * token)
    most = most if window is None else min(most, window - 1)
    return keys, values, slot, first, rows, heads, capacity, token, window or 0, most


NO_CACHE: Values = (*[None] * 4, *[0] * 6)
