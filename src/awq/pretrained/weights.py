"""The weights of a float model that stays on disk: block after block, the next one read while one is worked on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from awq.algorithm.held import InMemory
from awq.checkpoint.files import TensorFiles
from awq.errors import CheckpointError
from awq.pretrained.source import Source, check_finite, skeleton
from awq.structure.linears import shared_parameters

READERS = 4  # threads that copy tensors out of mapped files: one alone waits for each page of a cold file
# transformers 5.5 asks for a tensor-parallel plan too
_MORE = {"tp_plan": None} if "tp_plan" in inspect.signature(convert_and_load_state_dict_in_model).parameters else {}


class DiskWeights:
    """A model whose blocks are on the meta device, but for the one that is worked on.

    prepare: what is done to a block that has its weights, such as to split its experts; the block is on `device`, with
        the parameters that `from_pretrained` would give it, in its own dtype
    """

    def __init__(
        self, source: Source, model: Any, blocks: str, device: torch.device, prepare: Callable[[str], None]
    ) -> None:
        self.name, self.model, self.device, self.prepare = source.name, model, device, prepare
        self.blocks: nn.ModuleList = model.get_submodule(blocks)
        self.prefix = blocks
        self.files = TensorFiles(source.folder)
        self.parts = _parts(model, self.files.names, blocks)
        self.seconds = 0.0  # spent waiting for the disk
        self._sizes = {path: path.stat().st_size for path in source.weight_files()}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reader, self._pool = ThreadPoolExecutor(1, "awq-read"), ThreadPoolExecutor(READERS, "awq-copy")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def enter(self) -> Iterator[None]:
        """What lies outside of the blocks is mapped from its files; it stays until the end, and takes no memory."""
        self.load_rest()
        yield

    def load_rest(self) -> None:
        rest = {name: self.files.load(name) for name in self.parts.get(None, ())}
        self._load(rest, torch.device("cpu"))
        self.model.tie_weights()
        missing = (name for name, parameter in self.model.named_parameters() if parameter.is_meta)
        self._check(name for name in missing if not name.startswith(f"{self.prefix}."))

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """The block has its weights, until this ends; the one behind it is read meanwhile."""
        name = f"{self.prefix}.{index}"
        self._load(self._read_ahead(index).result(), self.device)
        del self._ahead[index]
        if index + 1 < len(self.blocks):
            self._read_ahead(index + 1)
        self._check(f"{name}.{own}" for own, p in self.blocks[index].named_parameters() if p.is_meta)
        check_finite(self.blocks[index], self.name, f"{name}.")
        modules = dict(self.blocks[index].named_modules())
        self.prepare(name)
        try:
            yield
        finally:
            for own, module in modules.items():  # what is loaded the next time is what the files hold
                if own and self.blocks[index].get_submodule(own) is not module:
                    self.blocks[index].set_submodule(own, module)
            _release(self.blocks[index])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for waiting in self._ahead.values():
            waiting.cancel()
        self._reader.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)

    def _read_ahead(self, index: int) -> Future[dict[str, Tensor]]:
        if index not in self._ahead:
            self._ahead[index] = self._reader.submit(self._read, self.parts.get(index, ()))
        return self._ahead[index]

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of stored tensors on the device, which is busy with another block."""
        for path, size in self._sizes.items():  # to read a mapped file that was cut ends the process
            if not path.exists() or path.stat().st_size != size:
                raise CheckpointError(f"{path} has changed since the run began: put the former file back and rerun.")
        names = list(names)
        copies = dict(zip(names, self._pool.map(self._copy, names), strict=True))
        if self._stream:
            self._stream.synchronize()
        return copies

    def _copy(self, name: str) -> Tensor:
        stored = self.files.load(name)
        if not self._stream:
            return stored.clone()
        with torch.cuda.stream(self._stream):
            copy = stored.to(self.device)
            copy.record_stream(torch.cuda.default_stream(self.device))
            return copy

    def _load(self, stored: dict[str, Tensor], device: torch.device) -> None:
        """Give the model's parameters the stored tensors, as transformers converts them."""
        used = self.model._weight_conversions  # of all the files, not of these tensors alone
        conversions: list[Any] = get_model_conversion_mapping(self.model)
        with _no_bars():
            convert_and_load_state_dict_in_model(
                model=self.model,
                state_dict=stored,
                load_config=LoadStateDictConfig(device_map={"": device}, weight_mapping=conversions),
                **_MORE,
            )
        self.model._weight_conversions = used

    def _check(self, missing: Iterable[str]) -> None:
        if name := next(iter(missing), None):
            raise CheckpointError(
                f"{self.name} has no tensor of its own for {name}: rerun with --whole, which loads all of it at once."
            )


class LoadedWeights(InMemory):
    """A model in memory, whose blocks are dropped as they are done."""

    def __init__(self, model: Any, blocks: str) -> None:
        self.blocks: nn.ModuleList = model.get_submodule(blocks)
        self.once = not shared_parameters(self.blocks)
        self.entered = False

    @contextmanager
    def enter(self) -> Iterator[None]:
        yield
        self.entered = True

    def load_rest(self) -> None:
        """All is there."""

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        yield
        if self.once and self.entered:
            _release(self.blocks[index])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass


def open_outline(source: Source) -> Any:
    """The model as transformers loads it, all weights on the meta device, the buffers that no file holds real.

    CheckpointError for tensors that are missing or of another shape.
    """
    with _no_bars():
        model = source.load(device_map={"": "meta"})
    buffers = dict(skeleton(model.config, model.dtype, source.trust_remote_code).named_buffers())
    stored = model.state_dict()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            full = f"{prefix}.{name}".lstrip(".")
            if buffer is not None and buffer.is_meta and full not in stored:
                module._buffers[name] = buffers[full].to(buffer.dtype)
    return model


def obstacle(source: Source, model: Any, blocks: str) -> str | None:
    """Why the blocks of `model` cannot be read one by one; None where they can."""
    if source.gguf:
        return "a GGUF is dequantized whole"
    inside = {id(parameter) for parameter in model.get_submodule(blocks).parameters()}
    if inside & set(shared_parameters(model)):
        return "its blocks share weights"
    parts, stored = _parts(model, TensorFiles(source.folder).names, blocks), model.state_dict()
    without = set(map(str, range(len(model.get_submodule(blocks))))) - {str(part) for part in parts}
    has_weights = {name.removeprefix(f"{blocks}.").partition(".")[0] for name in stored}
    return f"its files hold no tensors of {blocks}.{min(without)}" if without & has_weights else None


def _parts(model: Any, names: Iterable[str], blocks: str) -> dict[int | None, list[str]]:
    """The stored tensors by the block that they belong to; None for what lies outside of them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    own, prefix = dict.fromkeys(model.state_dict(), True), model.base_model_prefix
    number = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    parts: dict[int | None, list[str]] = {}
    for name in names:
        renamed, _ = rename_source_key(name, renamings, converters, prefix, own)
        if renamed not in own and name in own:
            renamed = name
        found = number.match(renamed)
        parts.setdefault(int(found[1]) if found else None, []).append(name)
    return parts


def _release(block: nn.Module) -> None:
    """Drop the block's weights; buffers that are computed stay."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bar of transformers for every block."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
