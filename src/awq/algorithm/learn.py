"""effort="max": the rounding, group scales and norm weights of a block, learned together by gradient.

Straight-through rounding (Cheng et al. 2023, arXiv 2309.05516) from where compensated rounding left off: the block's
output behind quantized blocks is brought closer to the float model's. Held-out text decides whether that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from awq.algorithm.graphed import Graphed
from awq.algorithm.inputs.capture import CHUNK_TOKENS
from awq.algorithm.inputs.precision import fast_matmul
from awq.algorithm.inputs.propagate import Propagation, replaced_weights
from awq.algorithm.inputs.text import Batch, Text, Weights, distance
from awq.algorithm.ranks import here
from awq.algorithm.search.affine import SMALLEST_SCALE
from awq.algorithm.search.solution import Coded

STEPS = 200
CHUNKS = 2  # of a step: 4096 tokens
CODE_RATE = 0.01  # of Adam, in steps of the grid; it falls to 0
GAIN_RATE = 1e-3  # of scales and norm weights, relative
EPSILON = 1e-15  # a single weight's share of the loss is far below Adam's default of 1e-8
CPU_FLOPS = 1e11  # of two cores with bfloat16 products


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
    text = Text(streams)
    if not text.held_out or not text.fit or not coded:
        return None
    with replaced_weights(streams.block, streams.done):
        before = text.loss({})
        if not 0 < before < float("inf"):
            return None
        for code_rate in (CODE_RATE, 0.0):  # where rounding learns nothing that holds, the gains alone
            linears = {name: _Linear(one) for name, one in coded.items()}
            scaled = {name: _Norm(streams.block.get_submodule(name), offset) for name, offset in norms.items()}
            _Training(text, linears, scaled, code_rate, before).run()
            learned = {name: linear.coded() for name, linear in linears.items()}
            weights = {name: norm.stored(stored_in) for name, norm in scaled.items()}
            after = text.loss({name: one.weight for name, one in learned.items()} | weights)
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


class _Training:
    """Adam on the mean squared distance of the block's output, in `unit`.

    The gradient of each chunk is taken by the rank that has it, with regard to the weights, and handed to all.
    """

    def __init__(
        self, text: Text, linears: Mapping[str, _Linear], norms: Mapping[str, _Norm], code_rate: float, unit: float
    ) -> None:
        self.text, self.linears, self.batch = text, linears, Batch(text)
        self.unit = unit * min(CHUNKS, len(text.fit))
        self.learners: dict[str, _Linear | _Norm] = {**linears, **norms}
        codes = [linear.codes for linear in linears.values()]
        gains = [learner.gain for learner in self.learners.values()]
        self.leaves, device = [*codes, *gains], codes[0].device
        self.rates = [(torch.tensor(start, device=device), start) for start in (code_rate, GAIN_RATE)]
        groups = [{"params": leaves, "lr": rate[0]} for leaves, rate in zip((codes, gains), self.rates, strict=True)]
        self.adam = torch.optim.Adam(groups, eps=EPSILON, foreach=False, capturable=device.type == "cuda")
        self.weights = {name: learner.weight().detach().requires_grad_() for name, learner in self.learners.items()}
        self.gradient, self.total = (
            {name: torch.zeros_like(weight) for name, weight in self.weights.items()} for _ in range(2)
        )

    def run(self) -> None:
        graphs = self.leaves[0].is_cuda and all(here().tell(self.batch.uniform))
        steps = (self._differentiate, self._update)
        differentiate, update = (Graphed(step) if graphs else step for step in steps)
        with torch.enable_grad(), fast_matmul(), sdpa_kernel(SDPBackend.MATH):  # other backends sum in any order
            for number, picks in enumerate(_picks(len(self.text.fit))):
                for rate, start in self.rates:
                    rate.fill_(start * (1 - number / STEPS))
                for place, pick in enumerate(self.text.fit[pick] for pick in picks):
                    if self.batch.load(pick):
                        differentiate()
                    self._add(self.text.owners[pick], first=place == 0)
                update()

    def _differentiate(self) -> None:
        """Zero for an expert that no token reached."""
        loss = distance(self.text.block, *self.batch.item, self.weights) / self.unit
        weights = tuple(self.weights.values())
        parts = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        for gradient, part in zip(self.gradient.values(), parts, strict=True):
            gradient.copy_(part)

    def _add(self, owner: int, first: bool) -> None:
        with torch.no_grad():
            for name, total in self.total.items():
                part = here().hand_out(self.gradient[name], owner)
                total.copy_(part) if first else total.add_(part)

    def _update(self) -> None:
        made = [learner.weight() for learner in self.learners.values()]
        for leaf, part in zip(
            self.leaves, torch.autograd.grad(made, self.leaves, list(self.total.values())), strict=True
        ):
            leaf.grad = part
        self.adam.step()
        with torch.no_grad():
            for linear in self.linears.values():
                linear.codes.clamp_(0, linear.top)
            for name, learner in self.learners.items():
                self.weights[name].copy_(learner.weight())


def _picks(chunks: int) -> Iterator[list[int]]:
    """The chunks of each step, all of them once before any is taken again; the same in every run."""
    generator, left = torch.Generator().manual_seed(0), list[int]()
    for _ in range(STEPS):
        while len(left) < min(CHUNKS, chunks):
            left += torch.randperm(chunks, generator=generator).tolist()
        picks, left = left[: min(CHUNKS, chunks)], left[min(CHUNKS, chunks) :]
        yield picks
