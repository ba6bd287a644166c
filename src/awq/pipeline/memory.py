"""How much memory a run may use, what a block of it needs, and what is left for activations."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from awq.algorithm.inputs.activations import LEAVING, Activations, Room
from awq.algorithm.inputs.capture import CHUNK_TOKENS
from awq.algorithm.passes import PASS_BYTES
from awq.algorithm.ranks import here
from awq.config import QuantConfig
from awq.errors import AwqError, ConfigError
from awq.structure.linears import LinearShape, linear_shape
from awq.structure.siblings import Siblings

SHARE = 0.9  # of what is free: others may want some
BASE = 1 << 30  # of host memory: Python and its libraries
_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """What a run may use, in bytes; None for most of what is free."""

    gpu: int | None = None
    host: int | None = None


def plan_activations(blocks: nn.ModuleList, config: QuantConfig, tokens: torch.Size, place: Place) -> Activations:
    """Where activations go, beside the largest of `blocks`, which may be on the meta device.

    ConfigError where not even that block fits.
    """
    gpu = place.device.type == "cuda"
    needed = max(block_bytes(block, config, tokens) for block in blocks) + (LEAVING if gpu else 0)
    most = place.device_bytes()
    if needed > most:
        raise ConfigError(
            f"a block needs about {needed / 1e9:.1f} GB of {place.kind} while it is solved, and {most / 1e9:.1f} GB "
            f"may be used: free some, raise {place.option}, choose another --device, or --effort fast, which needs "
            "less."
        )
    host = place.host_bytes() - BASE - needed // 8 if gpu else 0
    often = min(most - needed, _stream_bytes(blocks, tokens)) if gpu and config.effort != "fast" else 0
    return Activations(Room(most - needed - often), Room(max(0, host)), place.spill, Room(often))


def block_bytes(block: nn.Module, config: QuantConfig, tokens: torch.Size) -> int:
    """What is alive at the peak while a block is solved, estimated from shapes.

    Counted on blocks of Llama's proportions, as a GPU takes them. In the search for scales it is, for each weight, its
    float32 value and codes, for each input its Gram matrix, twice, and what a step makes on the way. Behind quantized
    linears it is for each weight its float32 value, codes and rounded value, in float32 and as a forward casts it, and
    the moments of the input with the largest: three of them while they are measured, two while its linears are solved.
    """
    shapes = {name: shape for name, module in block.named_modules() if (shape := linear_shape(module))}
    if not shapes:
        return 0
    weights = sum(parameter.numel() for parameter in block.parameters())
    inputs = Counter(shape.in_features for shape in shapes.values())
    largest, widest, hidden = max(map(math.prod, shapes.values())), max(inputs), _hidden(block)
    forward = 4 * max(CHUNK_TOKENS, tokens[1]) * 4 * (widest + hidden)
    ahead = 2 * weights
    inputs[hidden] = math.ceil(inputs[hidden] / 2)  # q, k and v read one, gate and up another
    grams = sum(4 * width**2 * count for width, count in inputs.items())
    scaled = 5 * weights + 2 * grams + max(32 * largest, forward)
    if config.effort == "fast":
        return ahead + scaled
    moments = _moments(block, shapes)
    solved = 11 * weights + max(3 * moments + forward, 2 * moments + 10 * widest**2 + 12 * largest)
    learned = 2 * grams + 33 * weights + 12 * tokens.numel() * hidden if config.effort == "max" else 0
    return ahead + max(scaled, solved + learned)


def _moments(block: nn.Module, shapes: Mapping[str, LinearShape]) -> int:
    """The largest moments that are measured at once: of linears with one input, or of experts in one pass."""
    like, rows, experts = Siblings(block), Counter[int](), 0
    for name, (width, out) in shapes.items():
        if like.place(name):
            experts += 4 * width * (width + out)
        else:
            rows[width] += out
    return max([min(experts, PASS_BYTES // 2), *(4 * width * (width + out) for width, out in rows.items())])


def _stream_bytes(blocks: nn.ModuleList, tokens: torch.Size) -> int:
    """What each process has of the hidden states between two blocks."""
    return 4 * tokens.numel() * max(map(_hidden, blocks)) // here().size


def _hidden(block: nn.Module) -> int:
    """The width that most linears of `block` read."""
    found = Counter(shape.in_features for module in block.modules() if (shape := linear_shape(module)))
    return found.most_common(1)[0][0] if found else 0


@dataclass(frozen=True)
class Place:
    """A device, what may be used of it and of the host, and the folder of files for what neither has room for."""

    device: torch.device
    limits: Limits
    folder: Path
    processes: int = 1  # that share the host's memory

    @property
    def kind(self) -> str:
        return "GPU memory" if self.device.type == "cuda" else "memory"

    @property
    def option(self) -> str:
        return "--gpu-memory" if self.device.type == "cuda" else "--host-memory"

    def device_bytes(self) -> int:
        if self.device.type != "cuda":
            # malloc keeps gaps: with all of 4 GiB to use, a block of a 1B shape was 0.18 GB over
            return max(0, int(SHARE * self.host_bytes()) - BASE)
        return self.limits.gpu or int(SHARE * torch.cuda.mem_get_info(self.device)[0])

    def host_bytes(self) -> int:
        return (self.limits.host or int(SHARE * free_host())) // self.processes

    def spill(self, size: int) -> Tensor:
        """Memory in a file without a name, gone when it is let go of; AwqError where the disk has no room."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):  # else a full disk would end the process at the first write
                    os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            raise AwqError(
                f"{self.folder} has no room for activations ({error}): free some space, or give more --host-memory."
            ) from error


def free_host() -> int:
    """Free host memory, within the limit of a container; boundless where nothing says."""
    found = [1 << 62]
    if _MEMORY.exists():
        facts = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        found.append(int(facts["MemAvailable"].split()[0]) << 10)
    try:
        most, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        found.append(most - used)
    except (OSError, ValueError):
        pass  # not in a container, or one without a limit ("max")
    return min(found)
