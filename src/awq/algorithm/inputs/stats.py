"""What the search needs of a linear's input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from awq.algorithm.inputs.activations import Activations, Kept
from awq.algorithm.inputs.precision import add_gram, mirror
from awq.algorithm.ranks import here


@dataclass
class InputStats:
    """Second moments of a linear's input x over the calibration text.

    gram:     float32 [in_features, in_features], the mean of x x^T over the tokens
    mean_abs: float32 [in_features], the mean of |x|
    """

    activations: ClassVar[Activations] = Activations()  # until they are moved elsewhere
    gram: Tensor = Kept()  # type: ignore[assignment]  # noqa: RUF009
    mean_abs: Tensor = Kept()  # type: ignore[assignment]  # noqa: RUF009
    tokens: float = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device) -> Self:
        return cls(torch.zeros(in_features, in_features, device=device), torch.zeros(in_features, device=device))

    def move(self, activations: Activations) -> None:
        """Wait in other rooms, no more to be added to."""
        self.__dict__["activations"] = activations
        self.gram, self.mean_abs = self.gram, self.mean_abs

    def add(self, x: Tensor, weight: float = 1) -> None:
        x = x.reshape(-1, x.shape[-1])
        add_gram(self.gram, x, weight)
        self.mean_abs += x.abs().sum(0, dtype=torch.float32) * weight
        self.tokens += x.shape[0] * weight

    def tensors(self) -> list[Tensor]:
        return [self.gram, self.mean_abs]

    def finish(self) -> None:
        for total in self.tensors():
            here().complete(total)
            total /= self.tokens or 1
        mirror(self.gram)

    def rescaled(self, scale: Tensor) -> InputStats:
        """The statistics of x / scale."""
        return replace(self, gram=self.gram / scale / scale.unsqueeze(1), mean_abs=self.mean_abs / scale)

    @property
    def finite(self) -> bool:
        return bool(self.gram.isfinite().all())
