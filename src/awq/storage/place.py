"""Where one GPU is not enough: which layers go where, decided and carried out by accelerate.

What is placed on "cpu" or "disk" beside a GPU is kept there in that GPU's layout, and runs on the GPU: it is copied
there for every forward.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from torch import nn

from awq.errors import ConfigError
from awq.linear import QuantLinear

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_KEPT = ("cpu", "disk")  # places that hold weights for another device
_SHARE = 0.9  # of a GPU's free memory that weights may take; caches and activations need the rest

Places = dict[str, int | str]


def is_spread(device_map: Any, max_memory: Any, weight_bytes: int) -> bool:
    """Whether a model of so many bytes is to be placed in parts: asked for, or too large for the first GPU."""
    if isinstance(device_map, Mapping):
        return len({str(place) for place in device_map.values()}) > 1
    if device_map not in AUTOMATIC:
        return False
    if max_memory is not None:
        return True
    return torch.cuda.is_available() and weight_bytes > _SHARE * torch.cuda.mem_get_info(0)[0]


def find_places(model: Any, device_map: Any, max_memory: Mapping[Any, Any] | None) -> Places:
    """Module name -> GPU number, "cpu" or "disk", for every part of a model whose weights lie on the CPU still."""
    if isinstance(device_map, Mapping):
        return {str(name): _place(place) for name, place in device_map.items()}
    together = list(getattr(model, "_no_split_modules", None) or [])
    memory = dict(max_memory) if max_memory is not None else None
    if device_map != "sequential" and torch.cuda.is_available():
        low_zero = device_map == "balanced_low_0"
        memory = get_balanced_memory(model, memory, no_split_module_classes=together, low_zero=low_zero)
    if memory is None:
        memory = {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    if max_memory is None:
        memory = {where: int(_SHARE * size) if isinstance(where, int) else size for where, size in memory.items()}
    found: Places = infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=together, offload_buffers=True
    )
    return found


def spread(
    model: Any, places: Places, prepare: Callable[[QuantLinear], None], offload_folder: str | Path | None = None
) -> Any:
    """Move every part to its place, its linears prepared by `prepare` for the device that they run on.

    offload_folder: for what goes to "disk"; a temporary one by default. ConfigError for a part without a place.
    """
    if places.get("") == "disk":  # accelerate writes what has a name
        children: Places = {name: "disk" for name, _ in model.named_children()}
        places = children | {name: place for name, place in places.items() if name}
    gpus = [place for place in places.values() if place not in _KEPT]
    main: int | str = gpus[0] if gpus else "cpu"
    folder = Path(offload_folder) if offload_folder else None
    if folder is None and "disk" in places.values():
        folder = Path(tempfile.mkdtemp(prefix="awq-offload-"))
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            place = _of(name, places)
            module.to(_device(main if place in _KEPT else place))
            prepare(module)
            if place in _KEPT and main != "cpu":
                _keep_on_cpu(module)
    skip = getattr(model, "_skip_keys_device_placement", None)
    accelerate.dispatch_model(
        model, dict(places), main_device=main, offload_dir=folder, offload_buffers=True, skip_keys=skip
    )
    model.hf_device_map = dict(places)
    return model


def _keep_on_cpu(module: nn.Module) -> None:
    """The buffers as they are: moving the module itself would repack them for the CPU."""
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.cpu()


def _of(name: str, places: Places) -> int | str:
    """The place of a module: that of the longest name in front of it."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        if (found := places.get(".".join(parts[:length]))) is not None:
            return found
    raise ConfigError(f"device_map has no place for {name}: add it, or one for everything as ''.")


def _place(word: Any) -> int | str:
    """A place as accelerate writes it."""
    text = str(word)
    if text in _KEPT:
        return text
    number = text.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdigit() or int(number) >= torch.cuda.device_count():
        raise ConfigError(
            f"device_map names {text!r}, which is not there: torch sees {torch.cuda.device_count()} CUDA GPUs; "
            "use their numbers, cpu or disk."
        )
    return int(number)


def _device(place: int | str) -> torch.device:
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
