"""Llama's shapes with random weights, as real safetensors folders, written as fast as the disk takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from awq.checkpoint.slots import Slots
from awq.pretrained.source import skeleton

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8},
}
VOCABULARY = 32000
_POOL = 1 << 26  # random numbers, of which every tensor takes some


def write_model(folder: Path, shape: str, blocks: int | None = None) -> Path:
    """The folder, made unless it is there; `blocks` leaves out the others."""
    if (folder / "config.json").exists():
        return folder
    settings = SHAPES[shape] | ({"num_hidden_layers": blocks} if blocks else {})
    config = LlamaConfig(**settings, vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    outlines = dict(skeleton(config, torch.bfloat16).named_parameters())
    slots = Slots(folder, outlines, 5 * 10**9)
    slots.allocate()
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, (name, outline) in enumerate(outlines.items()):
        slots.fill(
            name, torch.ones(outline.shape, dtype=torch.bfloat16) if outline.ndim == 1 else _cut(pool, outline, number)
        )
    slots.write_index()
    _tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def _cut(pool: Tensor, outline: Tensor, number: int) -> Tensor:
    """Numbers of the pool, from a place of the tensor's own on, again and again."""
    start = (number * 7919 * 4096) % _POOL
    times = -(-outline.numel() // _POOL) + 1
    return pool.roll(-start).repeat(times)[: outline.numel()].view(outline.shape)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: text must be tokens of the model, and nothing else of it matters here."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
