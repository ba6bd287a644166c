"""The model that a configuration describes, made of nothing, held against what its weight files hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from awq.checkpoint.files import Held
from awq.errors import CheckpointError

# A tensor of a file may be several in the model, and buffers are in no file: a causal mask of 8192 x 8192 is 2**26.
_PLACES_A_TENSOR = 8
_SLACK_VALUES, _SLACK_PLACES = 1 << 27, 4096


def check_outline(auto: Any, config: Any, held: Held, name: str) -> None:
    """CheckpointError where `config` describes many more tensors, or larger ones, than the files can fill.

    The model is made on the meta device, so that no size costs memory, and given up as soon as it is too large.
    """
    with torch.device("meta"), _limited(held, name):
        auto.from_config(config, trust_remote_code=False)


@contextmanager
def _limited(held: Held, name: str) -> Iterator[None]:
    left = [_SLACK_PLACES + _PLACES_A_TENSOR * held.tensors, _SLACK_VALUES + held.values]

    def count(_module: Any, _key: str, tensor: torch.Tensor | None) -> None:
        left[0] -= 1
        left[1] -= 0 if tensor is None else tensor.numel()
        if min(left) < 0:
            raise CheckpointError(
                f"{name} has weight files of {held.tensors} tensors, and a config.json that describes a much larger "
                "model: one of them is of another model."
            )

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
