"""What a model will be stored as, known from its outline before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from awq.packing import StoredShape
from awq.storage.names import not_converted, of_module, to_stored
from awq.storage.save import Float, stored_floats
from awq.structure.linears import linear_shape
from awq.structure.plan import Plan


class Stored:
    """The tensors of a checkpoint.

    linears:  stored name of each linear to quantize, by its name in the model
    floats:   stored name and dtype of everything else, by its name in the model
    shapes:   of the quantized linears, by stored name
    outlines: every tensor by stored name, on the meta device
    """

    def __init__(self, outline: Any, planned: Plan) -> None:
        rename = of_module(to_stored(outline))
        self.quant = planned.config.with_kept(not_converted(outline, planned.not_converted, planned.linears))
        self.linears = {name: rename(name) for name in planned.linears}
        self.floats = stored_floats(outline, planned.linears)
        state = outline.state_dict()
        self._origin = {name: state[name].dtype for name in self.floats}
        self.shapes: dict[str, StoredShape] = {}
        self.outlines: dict[str, Tensor] = {}
        for name, stored in self.linears.items():
            module = outline.get_submodule(name)
            columns, rows = linear_shape(module) or (0, 0)
            group = planned.config.group_size or -1
            self.shapes[stored] = StoredShape("gemm", columns, rows, columns if group == -1 else group)
            for part, (dtype, shape) in self.shapes[stored].expected().items():
                self.outlines[f"{stored}.{part}"] = torch.empty(shape, dtype=dtype, device="meta")
            if module.bias is not None:
                self.outlines[f"{stored}.bias"] = torch.empty(rows, dtype=torch.float16, device="meta")
        for name, own in self.floats.items():
            self.outlines[own.stored] = torch.empty(state[name].shape, dtype=own.dtype, device="meta")
        self.blocks = planned.blocks

    @cached_property
    def outside(self) -> list[str]:
        """What of the floats lies outside of the blocks."""
        return [name for name in self.floats if not name.startswith(f"{self.blocks}.")]

    @cached_property
    def _by_block(self) -> dict[str, list[str]]:
        depth = self.blocks.count(".") + 2
        found: dict[str, list[str]] = {}
        owners = {stored: name for name, stored in self.linears.items()}
        owners |= {own.stored: name for name, own in self.floats.items()}
        for tensor in self.outlines:
            name = owners.get(tensor) or owners[tensor.rpartition(".")[0]]
            found.setdefault(".".join(name.split(".")[:depth]), []).append(tensor)
        return found

    def names_of(self, block: str) -> list[str]:
        """The stored tensors of a block."""
        return self._by_block.get(block, [])

    def float_of(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """The name and the value under which a tensor outside of quantized linears is stored."""
        own: Float = self.floats[name]
        return own.stored, value.to(self._origin[name]).to(own.dtype)

    def exact(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a block's float32 values that are not what will be stored of them."""
        stored = {name: self._stored_value(name, value) for name, value in values.items()}
        return {name: value for name, value in values.items() if not torch.equal(stored[name].to(value.dtype), value)}

    def _stored_value(self, name: str, value: Tensor) -> Tensor:
        if name in self.floats:
            return self.float_of(name, value)[1]
        return value.to(torch.float16)  # the bias of a quantized linear
