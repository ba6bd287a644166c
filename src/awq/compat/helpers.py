"""AutoAWQ's helper functions, each a line or two on top of what this package has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import AwqError
from awq.evaluate import evaluation_tokens, perplexity
from awq.model import AwqModel
from awq.packing import GEMM_ORDER, PackedInt4, unpack_words


class AwqQuantizer:
    """A name to pass as `quantizer_cls` or to subclass; there is no such object here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AwqError(
            "AwqQuantizer cannot be built here: call AutoAWQForCausalLM's quantize() or awq.quantize_model()."
        )


def get_best_device() -> str:
    """ "cuda:0", "mps" or what else torch can compute on, else "cpu"."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "cpu"
    return "mps" if device.type == "mps" else f"{device.type}:0"


def dequantize_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:  # noqa: ARG001
    """The weight [in_features, out_features] in the scales' dtype; the group size is read off the shapes."""
    _check_bits(bits)
    return PackedInt4(qweight, qzeros, scales).dequantize(scales.dtype).t()


def unpack_awq(qweight: Tensor, qzeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [in_features, out_features] and zeros int8 [groups, out_features], channels as the nibbles lie."""
    _check_bits(bits)
    in_place = tuple(range(8))
    return unpack_words(qweight, in_place).to(torch.int8), unpack_words(qzeros, in_place).to(torch.int8)


def reverse_awq_order(iweights: Tensor, izeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `unpack_awq` returns, with the channels in order."""
    _check_bits(bits)
    return _in_order(iweights), _in_order(izeros)


def evaluate_perplexity(model: nn.Module, tokenizer: Any) -> float:
    """Perplexity on WikiText-2's test split (downloaded) in windows of 2048 tokens.

    Empty rows are left out and no special token is added, so that it is near AutoAWQ's figure but not equal to it.
    """
    inner = model.model if isinstance(model, AwqModel) else model
    tokens = evaluation_tokens(tokenizer, "Salesforce/wikitext:wikitext-2-raw-v1")
    return perplexity(inner, tokens, window=2048).value


def _in_order(values: Tensor) -> Tensor:
    ordered = torch.empty_like(values).view(-1, 8)
    ordered[:, list(GEMM_ORDER)] = values.reshape(-1, 8)
    return ordered.view(values.shape)


def _check_bits(bits: int) -> None:
    if bits != 4:
        raise AwqError(f"bits={bits} cannot be unpacked: only 4-bit weights are stored.")
