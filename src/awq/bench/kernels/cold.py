"""Time the package's own kernels, a dense linear and peers on one linear, its weights out of the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from awq import jit
from awq.bench.kernels.chain import Calls, Chain, Fresh, worst
from awq.bench.kernels.peers import Peer, attempt
from awq.bench.kernels.shapes import DTYPE_NAMES, Setting
from awq.bench.kernels.weights import dense_weight, random_linear
from awq.bench.results import DENSE, PEER, KernelRow, row_of
from awq.bench.timing import Replay, Timing, record, replay_seconds, time_in_turn
from awq.kernels.cuda.layout import Units, to_units

T = TypeVar("T")
# How a kernel of this package is called: x [rows, in_features], weight, y [rows, out_features]. Any number of rows.
Multiply = Callable[[Tensor, Units, Tensor], object]

GEMV_MOST_ROWS = 32  # 4 launches: what more would show is that GEMM is faster
_ROTATED_BYTES = 220_000_000  # of weight copies, and at least four times the L2 cache
_L2_FACTOR = 4
_CALLS, _CALLS_OF_MANY_ROWS, _MANY_ROWS = 100, 40, 128
# After a pause the clocks are up again: for calls that draw full power as long as they take to cool down.
_PAUSE_S, _PAUSE_OF_MANY_ROWS_S = 0.01, 0.08
# Accumulated in float32, an error comes from rounding y; in float16, as some peers do, 6e-3 was seen.
_OWN_ERROR = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
_PEER_ERROR = 2e-2
# A peer that takes so much longer than the dense linear, and so long, is not timed on more rows.
_TOO_SLOW, _TOO_SLOW_S = 4, 1e-3


@dataclass
class Contender:
    """Something to time in a cell. switch: what must be in force while it is called; dtype: of its x."""

    version: str
    kernel: str
    calls: Calls
    dtype: torch.dtype
    pdl: bool = False
    switch: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def name(self) -> str:
        return f"{self.version} {self.kernel}{' pdl' * self.pdl}"


class ColdLinear:
    """One setting's weight in every form that is timed, in as many copies as the L2 cache cannot hold."""

    def __init__(self, setting: Setting, device: torch.device, own: Mapping[str, Multiply], pdl: bool) -> None:
        self.setting, self.device, self._own = setting, device, own
        self._switches: list[tuple[bool, Callable[[], AbstractContextManager[object]]]] = [(False, nullcontext)]
        if pdl:
            self._switches = [(False, lambda: jit.programmatic(False)), (True, lambda: jit.programmatic(True))]
        self._random = torch.Generator(device)
        self._random.seed()
        packed, outliers = random_linear(setting, device, self._random)
        self._packed = packed
        self._dense = dense_weight(packed, outliers)
        self.notes: list[str] = []
        self.left_out: dict[str, str] = {}
        first = self._dense.to(setting.dtype)
        self._dense_copies = _copies(first, torch.clone, self._count(first.nbytes))
        units = to_units(packed, outliers, device)
        self._units = _copies(units, _clone_units, self._count(setting.weight_bytes))
        self._peers: dict[str, tuple[Peer, list[Callable[[Tensor], Tensor]]]] = {}

    def add(self, peer: Peer) -> None:
        """Prepare a peer's copies; where that fails, `left_out` says why."""
        reason = peer.rejects(self.setting)
        if reason is None:
            count = self._count(self.setting.weight_bytes)
            functions, reason = attempt(lambda: [peer.prepare(self._packed, self.setting) for _ in range(count)])
            if functions:
                self._peers[peer.name] = (peer, functions)
        if reason:
            self.left_out[peer.name] = reason

    def measure(self, rows: int) -> list[KernelRow]:
        """Every contender on `rows` rows, timed in turn."""
        size = (rows, self.setting.shape.in_features)
        x = torch.randn(size, generator=self._random, device=self.device).to(self.setting.dtype)
        contenders = self._able([*self._own_contenders(x), *self._peer_contenders(x)], rows)
        many = rows >= _MANY_ROWS
        calls = {one.name: max(_CALLS_OF_MANY_ROWS if many else _CALLS, one.calls.copies) for one in contenders}
        errors, replays = {}, {}
        for one in contenders:
            with one.switch():
                errors[one.name] = one.calls.check()
                replays[one.name] = record(one.calls.step, calls[one.name], self.device)
        timings = time_in_turn(replays, self.device, pause=_PAUSE_OF_MANY_ROWS_S if many else _PAUSE_S)
        found, dense_us = [], None
        outputs: dict[str, Tensor] = {}
        for one in contenders:
            error = worst(errors[one.name], self._check_after(one, replays[one.name], outputs))
            row = self._row(one, rows, timings[one.name], error, dense_us)
            dense_us = row.median_us if one.version == DENSE else dense_us
            found += [row] if self._believe(row) else []
        return found

    def _own_contenders(self, x: Tensor) -> Iterator[Contender]:
        """The dense linear, then each version, in chains; one for both ways of launching, which must agree in bits."""
        dtype, shape = self.setting.dtype, self.setting.shape
        dense = Chain(_multiply_dense, self._dense_copies, self._reference, shape, x)
        yield Contender(DENSE, f"cublas_{DTYPE_NAMES[dtype]}", dense, dtype)
        for version, multiply in self._own.items():
            if version == "GEMM" or x.shape[0] <= GEMV_MOST_ROWS:
                chain = Chain(multiply, self._units, self._reference, shape, x)
                for pdl, switch in self._switches:
                    yield Contender(version, f"awq_{version.lower()}", chain, dtype, pdl, switch)

    def _peer_contenders(self, x: Tensor) -> Iterator[Contender]:
        for name, (peer, functions) in self._peers.items():
            dtype = peer.dtype(self.setting.dtype)
            yield Contender(PEER, name, Fresh(functions, self._reference, x.to(dtype)), dtype)

    def _able(self, contenders: list[Contender], rows: int) -> list[Contender]:
        """Those whose first calls succeed, which compile and load what there is, and are not far slower than dense."""
        able, dense_s = [], 0.0
        for one in contenders:
            seconds, reason = attempt(partial(self._try, one))
            if one.version == DENSE:
                dense_s = seconds or 0.0
            if one.version == PEER and (seconds or 0.0) > max(_TOO_SLOW_S, _TOO_SLOW * dense_s):
                reason = f"more than {_TOO_SLOW} times slower than the dense linear"
            if reason is None:
                able.append(one)
            elif one.version == PEER:
                self.left_out[one.kernel] = f"{self.setting.shape} from {rows} rows on: {reason}"
                del self._peers[one.kernel]
            else:
                self.notes.append(f"{self._place(one.kernel, rows)}: {reason}")
        return able

    def _try(self, one: Contender) -> float:
        """Seconds of a call after a first one; errors on the GPU show too."""
        with one.switch():
            one.calls.step(0)
            return min(replay_seconds(Replay(partial(one.calls.step, 0), 1), self.device, 3))

    def _check_after(self, one: Contender, replay: Replay, outputs: dict[str, Tensor]) -> float:
        """Replay once more, poisoned, and check; what a kernel leaves must not depend on how it was launched."""
        if isinstance(one.calls, Chain):
            one.calls.poison()
            replay.run()
            output = one.calls.output_after(replay.calls).clone()
            if not torch.equal(output, outputs.setdefault(one.version, output)):
                self.notes.append(f"{self._place(one.kernel, output.shape[0])}: other bits with than without pdl")
        with one.switch():
            return one.calls.check_after(replay.calls)

    def _row(self, one: Contender, rows: int, timing: Timing, error: float, dense_us: float | None) -> KernelRow:
        facts = {"dtype": one.dtype, "pdl": one.pdl, "error": error, "dense_us": dense_us}
        return row_of(self.setting, rows, one.version, one.kernel, timing, **facts)  # type: ignore[arg-type]

    def _believe(self, row: KernelRow) -> bool:
        """False for a peer whose result is wrong; a wrong result of our own stays, with a note."""
        limit = _PEER_ERROR if row.version == PEER else _OWN_ERROR[self.setting.dtype]
        if row.error is not None and row.error <= limit:
            return True
        self.notes.append(f"{self._place(row.kernel, row.rows)}: relative error {row.error:.1e}")
        return row.version != PEER

    def _place(self, kernel: str, rows: int) -> str:
        return f"{kernel}, {self.setting.shape}, {rows} rows"

    def _reference(self, x: Tensor) -> Tensor:
        return x @ self._dense.t()

    def _count(self, size: int) -> int:
        """Copies of `size` bytes that rotate: two at least."""
        total = _ROTATED_BYTES
        if self.device.type == "cuda":
            total = max(total, _L2_FACTOR * torch.cuda.get_device_properties(self.device).L2_cache_size)
        return max(2, -(-total // size))


def _copies(first: T, clone: Callable[[T], T], count: int) -> list[T]:
    return [first, *(clone(first) for _ in range(count - 1))]


def _clone_units(units: Units) -> Units:
    kept = None if units.kept is None else units.kept.clone()
    return units._replace(codes=units.codes.clone(), affine=units.affine.clone(), kept=kept)


def _multiply_dense(x: Tensor, weight: Tensor, y: Tensor) -> None:
    torch.matmul(x, weight.t(), out=y)
