from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm.inputs.capture import enter_model
from awq.errors import UnsupportedModelError


class Block(nn.Module):
    """Hands its hidden states on as `kind`: bare, or first of several values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(8, 8), kind

    def forward(self, hidden: Tensor, state: Any = None) -> Any:
        hidden = hidden + self.linear(hidden)
        kinds = {"bare": hidden, "pair": (hidden, None), "list": [hidden, None, None], "dict": {"hidden": hidden}}
        return kinds[self.kind]


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(kind), Block(kind)])
        self.kind = kind

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        for layer in self.layers:
            if self.kind == "pair":
                hidden, _ = layer(hidden)
            elif self.kind == "list":
                hidden, _, _ = layer(hidden)
            else:
                hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("kind", ["bare", "pair", "list"])
def test_blocks_return_hidden_states_alone_or_first(kind: str) -> None:
    model, tokens = Model(kind), torch.arange(6).view(1, 6)
    with torch.no_grad():
        chunk = enter_model(model, model.layers, tokens, torch.device("cpu"))[0]
        hidden = chunk.hidden
        for call, block in zip(chunk.calls, model.layers, strict=True):
            hidden = call.run(block, hidden)
        assert torch.equal(hidden, model(tokens, use_cache=False))


def test_blocks_that_return_no_hidden_states_are_refused_by_name() -> None:
    model = Model("dict")
    with torch.no_grad():
        chunk = enter_model(model, model.layers, torch.arange(6).view(1, 6), torch.device("cpu"))[0]
        with pytest.raises(UnsupportedModelError, match="Block returns dict"):
            chunk.calls[0].run(model.layers[0], chunk.hidden)
