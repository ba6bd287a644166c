"""The model that a configuration describes, made of nothing, held against what its weight files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from awq.checkpoint.files import Held
from awq.errors import CheckpointError

# A tensor of a file may be several in the model; buffers need not be in a file: a causal mask of 8192 x 8192 is 2**26.
_PLACES_A_TENSOR, _MORE_PLACES = 8, 1024
_MORE_VALUES, _BUFFER_VALUES = 1 << 20, 1 << 27


def check_outline(auto: Any, config: Any, held: Held, name: str) -> None:
    """CheckpointError where `config` describes many more tensors, or larger ones, than the files can fill.

    The model is made on the meta device, so that no size costs memory, and given up as soon as it is too large.
    """
    with torch.device("meta"), _limited(held, name):
        auto.from_config(config, trust_remote_code=False)


@contextmanager
def _limited(held: Held, name: str) -> Iterator[None]:
    places = _MORE_PLACES + _PLACES_A_TENSOR * held.tensors
    parameters = _counter(name, places, _MORE_VALUES + held.values)
    buffers = _counter(name, places, _BUFFER_VALUES + held.values)
    hooks = [register_module_parameter_registration_hook(parameters), register_module_buffer_registration_hook(buffers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _counter(name: str, places: int, values: int) -> Callable[..., None]:
    left = [places, values]

    def count(_module: Any, _key: str, tensor: torch.Tensor | None) -> None:
        left[0] -= 1
        left[1] -= 0 if tensor is None else tensor.numel()
        if min(left) < 0:
            raise CheckpointError(
                f"{name} has a config.json that describes a much larger model than its weight files hold: one of them "
                "is of another model."
            )

    return count
