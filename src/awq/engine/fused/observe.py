"""One forward of a model on a few tokens: what its linears, norms, rotary modules and attention read and gave.

Attention is seen where transformers calls it, as a function of query, key and value that a configuration names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from awq.engine.head import Int8Head
from awq.linear import QuantLinear

TOKENS = 11  # more than the windows of tiny models
_OBSERVED = "awq_observed"


@dataclass(frozen=True)
class LinearCall:
    order: int
    module: nn.Module
    input: Tensor  # [tokens, channels], as outputs are
    output: Tensor


@dataclass(frozen=True)
class NormCall:
    """A module that has one weight, a vector, and gives a tensor of its input's shape."""

    order: int
    module: nn.Module
    width: int
    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class RotaryCall:
    """A module that gives cosines and sines, [tokens, rotary] each."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    angles: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """query [heads, tokens, d], key and value [key_heads, tokens, d], output [tokens, heads * d]."""

    order: int
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    options: Mapping[str, Any]


@dataclass
class Observed:
    """The calls of one forward, in order, and what came out."""

    tokens: Tensor
    linears: list[LinearCall] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    rotaries: list[RotaryCall] = field(default_factory=list)
    attentions: list[AttentionCall] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    calls: int = 0

    def next(self) -> int:
        self.calls += 1
        return self.calls


def observe(model: Any) -> Observed:
    """Run `model` once on TOKENS tokens of its vocabulary."""
    table = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(len(table), (1, TOKENS), generator=generator).to(table.device)
    seen = Observed(tokens[0])
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_attention_seen(model, seen))
        for module in model.modules():
            stack.callback(module.register_forward_hook(_look(seen), with_kwargs=True).remove)
        seen.logits = model(input_ids=tokens, use_cache=False).logits[0]
    return seen


def _look(seen: Observed) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        x = args[0] if args else None
        if isinstance(output, tuple):
            if _are_angles(output):
                seen.rotaries.append(RotaryCall(module, args, kwargs, (output[0][0], output[1][0])))
        elif isinstance(x, Tensor) and isinstance(output, Tensor):
            if isinstance(module, nn.Linear | QuantLinear | Int8Head):
                seen.linears.append(LinearCall(seen.next(), module, x.flatten(0, -2), output.flatten(0, -2)))
            elif width := _norm_width(module, x, output):
                seen.norms.append(NormCall(seen.next(), module, width, x, output))

    return hook


def _norm_width(module: nn.Module, x: Tensor, output: Tensor) -> int | None:
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].ndim != 1 or x.shape != output.shape:
        return None
    width = len(parameters[0])
    return width if x.shape[-1] == width else None


def _are_angles(output: tuple[Any, ...]) -> bool:
    if len(output) != 2 or not all(isinstance(each, Tensor) and each.ndim == 3 for each in output):
        return False
    if output[0].shape != output[1].shape or output[0].shape[-1] % 2 or not output[0].is_floating_point():
        return False
    radius = output[0].float().square() + output[1].float().square()  # of a circle: some are scaled
    return bool((radius - radius.mean()).abs().max() < 0.02 * radius.mean())


@contextmanager
def _attention_seen(model: Any, seen: Observed) -> Iterator[None]:
    """Attention goes through a function that notes it, and on to torch's."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        order = seen.next()
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        parts = (query[0], key[0], value[0], output[0].flatten(1))
        seen.attentions.append(AttentionCall(order, *parts, options))
        return output, None

    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, config._attn_implementation) for config in configs.values() if _names_attention(config)]
    AttentionInterface.register(_OBSERVED, attention)
    AttentionMaskInterface.register(_OBSERVED, sdpa_mask)
    try:
        for config, _ in before:
            config._attn_implementation = _OBSERVED
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _names_attention(config: Any) -> bool:
    return hasattr(config, "_attn_implementation")
