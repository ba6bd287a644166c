"""effort="max": the rounding, group scales and norm weights of a block, learned together by gradient.

Straight-through rounding (Cheng et al. 2023, arXiv 2309.05516) from where compensated rounding left off: the block's
output behind quantized blocks is brought closer to the float model's. Held-out text decides whether that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from awq.algorithm.affine import SMALLEST_SCALE
from awq.algorithm.capture import CHUNK_TOKENS, Call, Chunk, fast_matmul
from awq.algorithm.propagate import Propagation, replaced_weights
from awq.algorithm.solution import Coded

STEPS = 200
CHUNKS = 2  # of a step: 4096 tokens
CODE_RATE = 0.01  # of Adam, in steps of the grid; it falls to 0
GAIN_RATE = 1e-3  # of scales and norm weights, relative
EPSILON = 1e-15  # a single weight's share of the loss is far below Adam's default of 1e-8
WARM_UP = 3  # eager steps before one is captured
CPU_FLOPS = 1e11  # of two cores with bfloat16 products

Entering = list[tuple[Chunk, Tensor]]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Learned:
    """coded: by linear; norms: the weights of norms, by name; loss: of the block on held-out text, before and after."""

    coded: dict[str, Coded]
    norms: Weights
    loss: tuple[float, float]


def cpu_minutes(weights: int) -> float:
    """About how long learning takes on a CPU, for a model with so many weights in the linears of its blocks."""
    return STEPS * CHUNKS * CHUNK_TOKENS * 6 * weights / CPU_FLOPS / 60


def learn(
    streams: Propagation, coded: Mapping[str, Coded], norms: Mapping[str, float], stored_in: torch.dtype
) -> Learned | None:
    """What is closer to the float model's output on held-out text than the block as it is in `streams`, or None.

    norms: what is added to the weight of each norm before it multiplies (0 or 1), by name
    """
    entering = list(streams.entering())
    held_out = [pair for pair in entering if pair[0].held_out]
    # chunks of one size, so that a CUDA graph serves them all
    fit = [pair for pair in entering if not pair[0].held_out and pair[1].shape == entering[0][1].shape]
    if not held_out or not fit or not coded:
        return None
    with replaced_weights(streams.block, streams.done):
        before = _loss(streams, held_out, {})
        if not 0 < before < float("inf"):
            return None
        for code_rate in (CODE_RATE, 0.0):  # where rounding learns nothing that holds, the gains alone
            linears = {name: _Linear(one) for name, one in coded.items()}
            scaled = {name: _Norm(streams.block.get_submodule(name), offset) for name, offset in norms.items()}
            _train(streams, fit, linears, scaled, code_rate, before)
            learned = {name: linear.coded() for name, linear in linears.items()}
            weights = {name: norm.stored(stored_in) for name, norm in scaled.items()}
            after = _loss(streams, held_out, _named({name: one.weight for name, one in learned.items()} | weights))
            if after < before:
                return Learned(learned, weights, (before, after))
    return None


class _Linear:
    """A linear's codes before rounding, and the gain of its scales."""

    def __init__(self, coded: Coded) -> None:
        assert coded.unrounded is not None
        self.start, grid = coded, coded.grid
        self.top = 2**grid.bits - 1
        codes = coded.unrounded.view(*grid.scales.shape, -1).clamp(0, self.top)
        self.codes, self.gain = codes.requires_grad_(), torch.zeros_like(grid.scales).requires_grad_()

    def weight(self) -> Tensor:
        """The weight, whose gradient passes through the rounding."""
        grid = self.start.grid
        codes = self.codes + (self.codes.round() - self.codes).detach()
        return ((codes - grid.zeros.unsqueeze(-1)) * self.scales.unsqueeze(-1)).flatten(1)

    @property
    def scales(self) -> Tensor:
        return self.start.grid.scales * (1 + self.gain)

    def coded(self) -> Coded:
        codes = self.codes.detach().flatten(1)
        scales = self.scales.detach().to(torch.float16).float().clamp_min(SMALLEST_SCALE)
        grid = replace(self.start.grid, scales=scales)
        return replace(self.start, grid=grid, codes=codes.round().to(torch.uint8), unrounded=codes, rounding="learned")


class _Norm:
    """A norm's gain, whatever it adds to its weight."""

    def __init__(self, module: nn.Module, offset: float) -> None:
        assert isinstance(module.weight, Tensor)
        self.start, self.offset = module.weight.data, offset
        self.gain = torch.zeros_like(self.start).requires_grad_()

    def weight(self) -> Tensor:
        return (self.start + self.offset) * (1 + self.gain) - self.offset

    def stored(self, dtype: torch.dtype) -> Tensor:
        return self.weight().detach().to(dtype).float()


def _train(
    streams: Propagation,
    fit: Entering,
    linears: Mapping[str, _Linear],
    norms: Mapping[str, _Norm],
    code_rate: float,
    unit: float,
) -> None:
    """Adam on the mean squared distance of the block's output, in `unit`."""
    learners: dict[str, _Linear | _Norm] = {**linears, **norms}
    codes = [linear.codes for linear in linears.values()]
    gains = [learner.gain for learner in learners.values()]
    device = fit[0][1].device
    starts = (code_rate, GAIN_RATE)
    rates = [torch.tensor(start, device=device) for start in starts]
    groups = [{"params": group, "lr": rate} for group, rate in zip((codes, gains), rates, strict=True)]
    adam = torch.optim.Adam(groups, eps=EPSILON, foreach=False, capturable=device.type == "cuda")
    batch = _Batch(fit, streams.index)

    def step() -> None:
        weights = _named({name: learner.weight() for name, learner in learners.items()})
        loss = torch.stack([_distance(streams.block, *item, weights) for item in batch]).mean() / unit
        for leaf, gradient in zip((*codes, *gains), _gradients(loss, (*codes, *gains)), strict=True):
            leaf.grad = gradient
        adam.step()
        with torch.no_grad():
            for code, linear in zip(codes, linears.values(), strict=True):
                code.clamp_(0, linear.top)

    run = _Graphed(step) if device.type == "cuda" and batch.uniform else step
    with torch.enable_grad(), fast_matmul(), sdpa_kernel(SDPBackend.MATH):  # other backends sum in any order
        for number, picks in enumerate(_picks(len(fit))):
            for rate, start in zip(rates, starts, strict=True):
                rate.fill_(start * (1 - number / STEPS))
            batch.load(picks)
            run()


def _picks(chunks: int) -> Iterator[list[int]]:
    """The chunks of each step, all of them once before any is taken again; the same in every run."""
    generator, left = torch.Generator().manual_seed(0), list[int]()
    for _ in range(STEPS):
        while len(left) < min(CHUNKS, chunks):
            left += torch.randperm(chunks, generator=generator).tolist()
        picks, left = left[: min(CHUNKS, chunks)], left[min(CHUNKS, chunks) :]
        yield picks


class _Batch:
    """The chunks of a step in tensors that stay where they are; items are a call, its input and the wanted output."""

    def __init__(self, fit: Entering, index: int) -> None:
        self.fit, self.index = fit, index
        count = min(CHUNKS, len(fit))
        self.inputs = [torch.empty_like(fit[0][1]) for _ in range(count)]
        self.targets = [torch.empty_like(fit[0][0].hidden) for _ in range(count)]
        self.calls: list[Call] = []

    @property
    def uniform(self) -> bool:
        """Whether every chunk is called alike, so that one call serves all."""
        first, *others = (
            tree_flatten((chunk.call(self.index).args, chunk.call(self.index).kwargs)) for chunk, _ in self.fit
        )
        return all(spec == first[1] and all(map(_equal, leaves, first[0])) for leaves, spec in others)

    def load(self, picks: list[int]) -> None:
        self.calls = [self.fit[pick][0].call(self.index) for pick in picks]
        for pick, x, y in zip(picks, self.inputs, self.targets, strict=True):
            x.copy_(self.fit[pick][1])
            y.copy_(self.fit[pick][0].hidden)

    def __iter__(self) -> Iterator[tuple[Call, Tensor, Tensor]]:
        return zip(self.calls, self.inputs, self.targets, strict=True)


class _Graphed:
    """A step in one CUDA graph; the first ones are eager, and all are where the block cannot be captured."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.count = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self.count += 1
        if self.count == WARM_UP + 1:
            self.graph = self._captured()
        if self.graph is None:
            self._aside()
        else:
            self.graph.replay()

    def _aside(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError:  # such as experts that ask which tokens are theirs
            return None
        return graph


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and (one is other or one == other)


def _named(weights: Weights) -> Weights:
    return {f"{name}.weight": weight for name, weight in weights.items()}


def _distance(block: nn.Module, call: Call, x: Tensor, target: Tensor, weights: Weights) -> Tensor:
    """The mean squared distance of the block's output to the float model's, with `weights` in it."""
    run = partial(_with_weights, block, weights)
    return (call.run(run, x) - target).square().mean()


def _with_weights(block: nn.Module, weights: Weights, *args: object, **kwargs: object) -> object:
    return functional_call(block, weights, args, kwargs)


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zero for an expert that no token reached."""
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def _loss(streams: Propagation, chunks: Entering, weights: Weights) -> float:
    with fast_matmul(enabled=False):
        losses = [
            len(x) * _distance(streams.block, chunk.call(streams.index), x, chunk.hidden, weights)
            for chunk, x in chunks
        ]
    return float(torch.stack(losses).sum()) / sum(len(x) for _, x in chunks)
