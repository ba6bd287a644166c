"""An int8 output head: a step reads half the bytes of the one large matrix that quantization leaves float.

Symmetric, a scale an output channel, rounded to nearest. torch's own int8 product takes a few rows; for more, parts of
the weight are dequantized, each of which serves all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from awq.errors import ConfigError

HEADS = ("float", "int8")
_FEW = 4  # rows: one core takes 4.0 ms with int8 and 4.8 with bfloat16 for 8 rows of 49152 x 576, 32 and 12 for 64
_CHUNK = 1 << 24  # weights dequantized at a time


class Int8Head(nn.Module):
    """y = x W^T with W = codes * scales: int8 [vocabulary, width] and [vocabulary] of the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        scales = (weight.abs().amax(1).float() / 127).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
        scales = scales.where(scales > 0, torch.ones_like(scales))  # a row of zeros, or too small for half precision
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for rows in range(0, len(weight), step := max(1, _CHUNK // weight.shape[1])):
            part = slice(rows, rows + step)
            codes[part] = (weight[part].float() / scales[part, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)
        self.codes: Tensor
        self.scales: Tensor
        self.bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., vocabulary] in the same dtype."""
        rows = x.reshape(-1, self.in_features)
        few = len(rows) <= _FEW and x.device.type == "cpu" and x.dtype == self.scales.dtype == torch.bfloat16
        y = torch._weight_int8pack_mm(rows.contiguous(), self.codes, self.scales) if few else self._dequantizing(rows)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _dequantizing(self, rows: Tensor) -> Tensor:
        y = rows.new_empty(len(rows), self.out_features)
        step = max(1, _CHUNK // self.in_features)
        for first in range(0, self.out_features, step):
            part = slice(first, first + step)
            y[:, part] = rows @ self.codes[part].to(rows.dtype).t()
        return y.mul_(self.scales.to(rows.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def use_head(model: Any, head: str | None) -> None:
    """Replace a float head by its int8 version for head="int8"; None and "float" leave it. ConfigError for another."""
    if head not in (None, *HEADS):
        raise ConfigError(f"head={head!r} is unknown: use one of {', '.join(HEADS)}.")
    found = model.get_output_embeddings() if head == "int8" else None
    if isinstance(found, nn.Linear):
        model.set_output_embeddings(Int8Head(found.weight.detach(), found.bias))
