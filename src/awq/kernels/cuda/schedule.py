"""Which GEMM design runs how many rows of a weight, and how its tiles are shared out among the multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass

from awq.kernels.cuda.designs import Design, designs, shared_limit
from awq.kernels.cuda.layout import Shape


@dataclass(frozen=True)
class Plan:
    """A design and how its tiles are shared out.

    token_tiles, row_blocks: tiles are their product
    workers:   blocks, or clusters of blocks, that run
    steps:     of a tile: walk of its k, then those of its kept channels
    whole:     whole tiles of each worker; share: steps of the remaining tiles of each, one more for the first `longer`
    kept_room: k16 steps of kept channels at a time in shared memory
    reason:    why this design, in a clause
    """

    design: Design
    reason: str
    token_tiles: int
    row_blocks: int
    workers: int
    steps: int
    walk: int
    whole: int
    share: int
    longer: int
    kept_room: int
    shared: int

    @property
    def tiles(self) -> int:
        return self.token_tiles * self.row_blocks

    @property
    def splits(self) -> bool:
        """Whether workers hand over parts of tiles, which takes a workspace."""
        return self.share > 0 or self.longer > 0

    @property
    def blocks(self) -> int:
        return self.workers * self.design.cluster

    @property
    def split_bytes(self) -> int:
        """Of the float32 sums that a workspace holds, 0 where no tile is split."""
        return self.blocks * self.design.block_rows * self.design.tokens * 4 if self.splits else 0


def plan(rows: int, shape: Shape, arch: str, sms: int) -> Plan:
    """How y [rows, out_features] is computed on `arch` with `sms` multiprocessors."""
    design, reason = _choose(rows, shape, arch, sms)
    limit = shared_limit(arch)
    return share_out(design.fitted(shape.group, limit), reason, rows, shape, limit, sms // design.cluster)


def _choose(rows: int, shape: Shape, arch: str, sms: int) -> tuple[Design, str]:
    """A design by rows; by the weight's size where the same design is not the best for all."""
    found = {design.name[0]: design for design in designs(arch)}
    n, k = shape.out_features, shape.in_features
    if rows <= 16:
        if "Q" in found and n * k >= 2**27:
            return found["Q"], "up to 16 rows of a weight so large that wide tiles pay"
        return found["P"], "up to 16 rows"
    if "A" in found:
        letter, reason = _choose_wgmma(rows, n, k, sms)
        return found[letter], reason
    fits = [design for design in found.values() if design.tokens >= min(rows, 64)] or list(found.values())
    return min(fits, key=lambda d: (-(-rows // d.tokens), d.tokens)), "mma.sync for all rows: no wgmma here"


def _choose_wgmma(rows: int, n: int, k: int, sms: int) -> tuple[str, str]:
    """The fastest on an H200 in all of 42 cells of rows and weights that were measured, but for ties."""
    size = n * k
    if rows <= 32:
        return ("B", "up to 32 rows of a large weight") if size >= 2**27 else ("A", "up to 32 rows")
    if rows <= 64 or (rows <= 128 and size <= 2**24):
        if size >= 2**27:
            return "E", "up to 64 rows of a large weight"
        return ("C", "up to 64 rows") if n > 4096 and rows <= 64 else ("D", "up to 64 rows of few outputs")
    waves = -(-n // 128) * -(-rows // 256) / sms  # of tiles of 128 x 256
    if rows <= 128 or (rows <= 512 and waves < 0.53 and k < 16384):
        return "F", "too few tiles of 256 rows"
    if 0.53 <= waves <= 1 or (n <= 4096 and rows <= 2048):
        return "G", "a wave of tiles of 256 rows, or few outputs"
    return "H", "many rows, enough tiles for pairs"


def share_out(design: Design, reason: str, rows: int, shape: Shape, limit: int, most_workers: int) -> Plan:
    """Whole tiles where they nearly fill their waves; else stream-K over the last one to two waves.

    Stream-K costs 9-15 % where tiles fill the waves, whole tiles up to 1.9 x where they do not. Up to 64 rows, where
    the weight's bytes decide, most of the multiprocessors read as fast as all: 0.7 of one wave is enough.
    """
    token_tiles, row_blocks = -(-rows // design.tokens), -(-shape.out_features // (design.block_rows * design.cluster))
    tiles, walk = token_tiles * row_blocks, -(-shape.in_features // design.step_k)
    room = design.kept_room(shape.kept_steps, shape.group, limit)
    steps = walk + (-(-shape.kept_steps // design.kept_each(room)) if shape.kept_steps else 0)
    waves, rest = divmod(tiles, most_workers)
    full = 0.7 if waves == 0 and design.tokens <= 64 else 0.93
    shared = design.shared(shape.group) + design.kept_bytes(room)
    if rest == 0 or steps == 1 or tiles > full * most_workers * (waves + 1):
        whole, workers, split = waves + (rest > 0), min(tiles, most_workers), 0
    else:
        whole = max(0, waves - 1)
        split = (tiles - whole * most_workers) * steps
        # A part of less than two steps costs more to hand over than to compute.
        workers = most_workers if whole else min(most_workers, max(tiles, split // 2))
    share, longer = divmod(split, workers)
    return Plan(design, reason, token_tiles, row_blocks, workers, steps, walk, whole, share, longer, room, shared)
