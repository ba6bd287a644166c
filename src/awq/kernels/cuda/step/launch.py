"""One kernel of a decode step with its arguments in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from struct import Struct
from typing import Any

from torch import Tensor

from awq import jit
from awq.kernels.cuda.layout import gpu

# The oldest architecture with programmatic dependent launch and tensor copies, which the step is built on.
OLDEST = (9, 0)


class Launch:
    """`launch(stream)` enqueues it; the tensors that it was made with are kept, and what it reads may change in place.

    A kernel may read what the step before the last `embed` wrote without waiting for the kernel ahead of it: nothing
    may be put between the launches of a step that writes the cache, or the numbers that count tokens.
    mapped: the tensor that a tensor map among the parameters is of; it is kept too
    """

    __slots__ = ("_keep", "_launcher", "_mapped", "_struct")

    def __init__(
        self,
        source: Path,
        name: str,
        defines: Mapping[str, int],
        grid: int,
        block: int,
        shared: int,
        struct: Struct,
        device: int,
        mapped: Tensor | None = None,
    ) -> None:
        kernel = jit.kernel(source, name, gpu(device).arch, defines)
        self._launcher: Any = kernel.launcher(grid, block, shared, struct.size, pdl=jit.programmatic())
        self._struct, self._mapped = struct, mapped
        self._keep: tuple[object, ...] = ()

    def bind(self, *values: Tensor | bytes | float | None) -> Launch:
        """Pack the parameter struct: tensors as their addresses, tensor maps as they are, None as 0."""
        self._keep = values
        numbers = (value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in values)
        self._struct.pack_into(self._launcher.params, 0, *numbers)
        return self

    def __call__(self, stream: int) -> None:
        self._launcher(stream)
