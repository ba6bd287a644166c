"""What a decoder is made of, as far as a fused step must know: found by `discover`, run by `reference` and `step`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awq.engine.head import Int8Head

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Norm:
    """x * rsqrt(mean(x^2) + epsilon) * weight; weight float32 [width], with the 1 that some models add to it."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


@dataclass(frozen=True)
class Rope:
    """The model's own rotary module, and how the angles that it gives turn the channels.

    module:      a copy, called with float32
    arguments:   its call with None where the positions go, "x" where the tensor goes whose dtype it takes
    rotary:      how many channels of a head turn, the first
    interleaved: 2i and 2i + 1 turn together, not i and i + rotary / 2
    every_other: of the angles, which come twice: the even ones, not the first half
    """

    module: nn.Module
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]]
    rotary: int
    interleaved: bool
    every_other: bool

    def table(self, count: int) -> Tensor:
        """float32 [count, rotary / 2, 2]: cosine and sine at each position, as decoding one token there finds them."""
        module, at = self._positions(count)
        if self.steady(count):
            return self._angles(module, at)
        return torch.cat([self._angles(module, at[i : i + 1]) for i in range(count)])

    def steady(self, count: int) -> bool:
        """Whether a position turns alike in every text of up to `count` tokens: some scale by the longest so far."""
        module, at = self._positions(count)
        whole = self._angles(module, at)
        looks = {min(2**i, count - 1) for i in range(count.bit_length())}
        return all(torch.equal(self._angles(module, at[i : i + 1])[0], whole[i]) for i in looks)

    def _positions(self, count: int) -> tuple[nn.Module, Tensor]:
        """A copy of the module, which may keep what it saw, and the positions where it lies."""
        module = copy.deepcopy(self.module)
        device = next((tensor.device for tensor in module.buffers()), torch.device("cpu"))
        return module, torch.arange(count, device=device)

    def _angles(self, module: nn.Module, positions: Tensor) -> Tensor:
        x = torch.zeros(1, 1, 1, device=positions.device)
        given = {"x": x, "positions": positions.unsqueeze(0)}
        args, kwargs = self.arguments

        def fill(value: Any) -> Any:
            return given[value.name] if isinstance(value, Given) else value

        with torch.no_grad():
            outputs: tuple[Tensor, Tensor] = module(*map(fill, args), **{name: fill(kwargs[name]) for name in kwargs})
        return torch.stack([halved(output[0].float(), self.every_other) for output in outputs], -1)


@dataclass(frozen=True)
class Given:
    """A place in recorded arguments: "x" or "positions"."""

    name: str


def halved(angles: Tensor, every_other: bool) -> Tensor:
    """[..., rotary] with each angle twice -> [..., rotary / 2]"""
    return angles[..., ::2] if every_other else angles[..., : angles.shape[-1] // 2]


def turn(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """RoPE of x [..., positions, head_dim] by table [positions, rotary / 2, 2]."""
    half = table.shape[1]
    cosine, sine = table[..., 0], table[..., 1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    parts = (a * cosine - b * sine, b * cosine + a * sine)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest], -1)


@dataclass(frozen=True)
class Attention:
    """query_at, key_at, value_at: the channel of the projection at which each begins, head after head.

    heads: of queries; scale: of the scores
    """

    heads: int
    key_heads: int
    head_dim: int
    query_at: int
    key_at: int
    value_at: int
    scale: float
    query_norm: Norm | None
    key_norm: Norm | None
    rope: Rope | None


@dataclass(frozen=True)
class Layer:
    """stream += factor * output(attention(qkv(norm(stream)))); stream += factor * down(act(gate) * up), gate and up the
    halves of gate_up(mlp_norm(stream)). A projection is linears whose outputs lie one after the other."""

    norm: Norm
    qkv: tuple[nn.Module, ...]
    attention: Attention
    output: nn.Module
    output_factor: float
    mlp_norm: Norm
    gate_up: tuple[nn.Module, ...]
    activation: str
    down: nn.Module
    down_factor: float


@dataclass(frozen=True)
class Plan:
    """logits = head_factor * head(norm(stream)), the stream starting as embedding_factor * embedding(tokens)."""

    embedding: Tensor
    embedding_factor: float
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Linear | Int8Head
    head_factor: float
