"""What is timed: the shapes of real models' linears, and a linear's settings with the bytes that a call must move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch

from awq.config import MAX_OUTLIER_RATIO
from awq.errors import ConfigError

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Shape:
    """A weight of N = out_features rows and K = in_features columns; written "NxK"."""

    out_features: int
    in_features: int

    @classmethod
    def parse(cls, text: str) -> Self:
        try:
            out_features, in_features = (int(part) for part in text.lower().split("x"))
        except ValueError:
            known = ", ".join(MODELS)
            raise ConfigError(
                f"shape {text!r} is not of the form NxK, such as 4096x11008, nor one of {known}."
            ) from None
        if out_features < 8 or out_features % 8 or in_features < 1:
            raise ConfigError(f"shape {text!r} cannot be packed: N must be a multiple of 8, and K positive.")
        return cls(out_features, in_features)

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


# N x K of qkv, o, gate_up and down, as an engine fuses them.
MODELS = {
    "llama-2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "llama-2-13b": ((15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)),
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
    "qwen2.5-7b": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)),
    "smollm2-135m": ((960, 576), (576, 576), (3072, 576), (576, 1536)),
}

# Beside the models' own: powers of two and not, wide and tall.
SWEEP = tuple(
    Shape(n, k)
    for n, k in (
        *((1536, 1536), (1536, 4096), (2048, 1536), (4096, 1536), (16384, 1536)),
        *((2048, 2048), (2048, 4096), (4096, 2048), (2048, 8192), (8192, 2048)),
        *((2048, 16384), (16384, 2048), (4096, 8192), (8192, 4096), (4096, 16384), (16384, 4096)),
        *((8192, 16384), (16384, 8192), (16384, 16384)),
        *((3584, 3584), (18944, 3584), (3584, 18944), (13824, 3584)),
        *((5120, 5120), (13824, 5120), (5120, 13824), (27648, 5120), (5120, 27648)),
        *((5120, 8192), (8192, 5120)),
    )
)


def find_shapes(words: Iterable[str]) -> list[Shape]:
    """The shapes of models and "NxK"s, each once; ConfigError for a word that is neither."""
    found: list[Shape] = []
    for word in words:
        model = MODELS.get(word.lower())
        found += [Shape(*sizes) for sizes in model] if model else [Shape.parse(word)]
    return list(dict.fromkeys(found))


def default_shapes(device: torch.device) -> tuple[Shape, ...]:
    """The linears of Llama-2-7B on a GPU, those of SmolLM2-135M, not fused, elsewhere."""
    if device.type == "cuda":
        return tuple(find_shapes(["llama-2-7b"]))
    width, inner = 576, 1536
    return Shape(width, width), Shape(inner, width), Shape(width, inner)


@dataclass(frozen=True)
class Setting:
    """A linear to time. group_size: input channels that share a scale, all of them for -1; dtype: of the activations.

    ConfigError for a group that does not divide K, a dtype that is not half precision, or too many outliers.
    """

    shape: Shape
    group_size: int
    dtype: torch.dtype
    zero_point: bool = True
    outlier_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.group_size == -1:
            object.__setattr__(self, "group_size", self.shape.in_features)
        if self.group_size < 1 or self.shape.in_features % self.group_size:
            raise ConfigError(
                f"group size {self.group_size} does not divide the K of {self.shape}: choose another of the two."
            )
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"dtype {str(self.dtype)!r} is no half precision: use fp16 or bf16.")
        if not 0 <= self.outlier_ratio <= MAX_OUTLIER_RATIO:
            raise ConfigError(f"outlier_ratio {self.outlier_ratio} is not between 0 and {MAX_OUTLIER_RATIO}.")

    @property
    def outliers(self) -> int:
        return max(1, round(self.outlier_ratio * self.shape.in_features)) if self.outlier_ratio else 0

    @property
    def weight_bytes(self) -> int:
        """Codes, fp16 scales, 4-bit zero points where there are any, and the fp16 outlier channels with their index."""
        n, k = self.shape.out_features, self.shape.in_features
        nibbles = n * k + n * (k // self.group_size) * (5 if self.zero_point else 4)
        return nibbles // 2 + self.outliers * (2 * n + 4)

    def call_bytes(self, rows: int) -> int:
        """The least that a call on `rows` rows moves: the weight and x read once, y written once."""
        return self.weight_bytes + 2 * rows * (self.shape.in_features + self.shape.out_features)
