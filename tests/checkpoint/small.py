"""Checkpoints of a few kilobytes, made in every way that a test needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from awq.checkpoint import Checkpoint, Written, write_checkpoint
from awq.checkpoint.write import NamedLinear
from awq.config import QuantConfig
from awq.packing import Outliers, PackedInt4, pack, to_layout

CONFIG = {"model_type": "llama", "hidden_size": 64}
QUANT = QuantConfig(group_size=32)
SETTINGS = {"quant_method": "awq", "zero_point": True, "group_size": 32, "bits": 4, "version": "gemm"}


def random_packed(
    in_features: int = 64, out_features: int = 16, group_size: int = 32, seed: int = 0, zero_point: bool = True
) -> PackedInt4:
    random = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features // group_size)
    codes = torch.randint(0, 16, (out_features, in_features), generator=random, dtype=torch.uint8)
    zeros = torch.randint(0, 16, shape, generator=random) if zero_point else torch.full(shape, 8)
    return pack(codes, zeros, torch.empty(shape).uniform_(0.001, 0.1, generator=random))


def random_outliers(index: list[int], out_features: int = 16) -> Outliers:
    residual = torch.randn(len(index), out_features, generator=torch.Generator().manual_seed(1)).half()
    return Outliers(torch.tensor(index, dtype=torch.int32), residual)


def small_linears() -> list[NamedLinear]:
    """Three linears: plain, with a bias, with fp16 channels."""
    return [
        ("blocks.0.up", random_packed(seed=1), None, None),
        ("blocks.0.gate", random_packed(seed=2), torch.linspace(-1, 1, 16).half(), random_outliers([0, 5, 63])),
        ("blocks.0.down", random_packed(128, 24, seed=3), None, random_outliers([127], 24)),
    ]


def small_floats() -> list[tuple[str, Tensor]]:
    return [("embed.weight", torch.arange(128.0).view(16, 8).bfloat16()), ("norm.weight", torch.ones(64))]


def write_small(folder: Path, **changes: Any) -> Written:
    """A complete folder by `write_checkpoint`."""
    arguments: dict[str, Any] = {
        "config": CONFIG,
        "quant": QUANT,
        "linears": small_linears(),
        "floats": small_floats(),
        "report": {"recipe": {"bits": 4}, "linears": {}},
    }
    return write_checkpoint(folder, **arguments | changes)


def raw_tensors(layout: str = "gemm") -> dict[str, Tensor]:
    """The tensors of one linear `a.b`, an embedding and nothing else."""
    stored = to_layout(layout, random_packed())
    return {f"a.b.{part}": tensor.contiguous() for part, tensor in stored.items()} | {"embed.weight": torch.ones(4, 4)}


def write_raw(folder: Path, tensors: dict[str, Tensor] | None = None, settings: dict[str, Any] | None = None) -> Path:
    """A folder as another tool would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIG | {"quantization_config": SETTINGS | (settings or {})}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(raw_tensors() if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def equal(left: PackedInt4, right: PackedInt4) -> bool:
    pairs = ((left.qweight, right.qweight), (left.qzeros, right.qzeros), (left.scales, right.scales))
    return all(torch.equal(a, b) for a, b in pairs)


def same_contents(checkpoint: Checkpoint, linears: list[NamedLinear]) -> bool:
    """Whether weights, biases and fp16 channels are exactly these."""
    for name, packed, bias, outliers in linears:
        stored_bias, kept = checkpoint.bias(name), checkpoint.outliers(name)
        if not equal(checkpoint.packed(name), packed) or (bias is None) != (stored_bias is None):
            return False
        if bias is not None and stored_bias is not None and not torch.equal(bias, stored_bias):
            return False
        if (outliers is None) != (kept is None):
            return False
        if (
            outliers
            and kept
            and not (torch.equal(outliers.index, kept.index) and torch.equal(outliers.residual, kept.residual))
        ):
            return False
    return checkpoint.linears == sorted(name for name, *_ in linears)


def digests(folder: Path) -> dict[str, str]:
    """Every file of the folder and a hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
