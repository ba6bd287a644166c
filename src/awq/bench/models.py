"""Models of known shapes with random weights, made where they run and without files: speed does not look at values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.kernels.weights import random_linear
from awq.engine import attach
from awq.engine.head import use_head
from awq.kernels import pinned_version
from awq.linear import QuantLinear
from awq.pretrained.source import replace_module, skeleton

_GROUP = 128
# width, inner width, layers, heads, kv heads, vocabulary
_SIZES = {
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
}
_TIED = {"smollm2-135m"}
MODELS = tuple(_SIZES)


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a model in `MODELS`."""
    width, inner, layers, heads, kv_heads, vocabulary = _SIZES[name]
    made: PretrainedConfig = (Qwen2Config if name.startswith("qwen") else LlamaConfig)(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=name in _TIED,
        bos_token_id=1,
        eos_token_id=2,
    )
    return made


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float16,
    group_size: int = _GROUP,
    outlier_ratio: float = 0.0,
    version: str | None = None,
    head: str | None = None,
    seed: int = 0,
) -> Any:
    """A quantized model of `config` on `device`, its linears as from a checkpoint, the values random.

    group_size: of the linears whose width it divides; the largest power of two that does, at most that, of others
    """
    generator = torch.Generator(device).manual_seed(seed)
    model = skeleton(config, dtype)
    pinned = pinned_version(version)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            group = next(size for size in (group_size, 128, 64, 32, 16) if module.in_features % size == 0)
            shape = Shape(module.out_features, module.in_features)
            setting = Setting(shape, group, dtype, outlier_ratio=outlier_ratio)
            packed, outliers = random_linear(setting, device, generator)
            biased = "bias" in dict(module.named_parameters())
            bias = torch.zeros(module.out_features, dtype=dtype, device=device) if biased else None
            layer = QuantLinear(packed, bias, outliers)
            layer.prepare(version=pinned, dtype=dtype)
            replace_module(model, name, layer)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = _random(parameter, dtype, device, generator)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    use_head(model, head)
    return attach(model.to(device))


def _random(like: Tensor, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Ones for a vector, which a norm has; else numbers whose products have about the variance of their input."""
    if like.ndim < 2:
        return torch.ones(like.shape, dtype=dtype, device=device)
    values = torch.empty(like.shape, dtype=dtype, device=device)
    return values.normal_(std=like.shape[-1] ** -0.5, generator=generator)
