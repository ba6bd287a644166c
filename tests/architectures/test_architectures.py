"""Every architecture: the groups that must be found, folded exactly, quantized, saved under its own names, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from awq.algorithm.inputs.capture import Chunk, enter_model
from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.pipeline.recipe import quantize_model
from awq.pretrained.source import replace_module
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from awq.structure.blocks import find_blocks
from awq.structure.groups import Structure, find_structure, fold
from awq.structure.linears import as_linear, linear_shape
from tests.architectures.families import FAMILIES, VOCABULARY, Family, tiny

TOKENS = torch.randint(1, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")

every_family = pytest.mark.parametrize(
    "family",
    [pytest.param(family, id=str(family), marks=() if family.core else pytest.mark.slow) for family in FAMILIES],
)


def model_of(family: Family) -> Any:
    if family.model_class() is None:
        pytest.skip(f"this transformers has no {family.name}ForCausalLM")
    return tiny(family)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=TOKENS).logits
        return result


def distance(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


def linear_names(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if linear_shape(part)}


def structures(model: Any) -> list[tuple[nn.Module, Structure]]:
    """Each block of `model` and what is found in it, as quantizing it would."""
    _, blocks = find_blocks(model)
    for name in linear_names(blocks):
        replace_module(blocks, name, as_linear(blocks.get_submodule(name)))
    with torch.no_grad():
        chunk = enter_model(model, blocks, TOKENS[:1], CPU)[0]
        return [(block, look(block, index, chunk)) for index, block in enumerate(blocks)]


def look(block: nn.Module, index: int, chunk: Chunk) -> Structure:
    found = find_structure(block, lambda: chunk.run(index, block, chunk.hidden))
    chunk.hidden = chunk.run(index, block, chunk.hidden)
    return found


@every_family
def test_the_groups_of_every_block(family: Family) -> None:
    for block, structure in structures(model_of(family)):
        found = {f"{group.producer} -> {', '.join(group.consumers)}" for group in structure.groups}
        assert found == set(family.groups)
        scaled = {name for group in structure.groups for name in group.consumers}
        assert linear_names(block) - scaled == set(family.unscaled)
        assert linear_names(block) == {name for names in structure.input_sets for name in names}


def fold_at_random(model: Any) -> None:
    """Every group of every block."""
    with torch.no_grad():
        for block, structure in structures(model):
            for group in structure.groups:
                channels = group.rows(block.get_submodule(group.producer).weight).shape[:2].numel()
                fold(block, group, torch.rand(channels) * 2 + 0.5)


@every_family
def test_folding_leaves_the_logits_unchanged(family: Family) -> None:
    model = model_of(family)
    before = logits(model)
    fold_at_random(model)
    assert 0 < distance(logits(model), before) < 1e-5


@every_family
def test_saved_and_loaded_under_its_own_names(family: Family, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path / "float")
    original = logits(model)
    linears = {f"{find_blocks(model)[0]}.{name}" for name in linear_names(find_blocks(model)[1])}
    text = CalibrationSet(TOKENS, ("random tokens",))
    report = quantize_model(model, QuantConfig(group_size=32, outlier_ratio=0.03), text, device="cpu", progress=False)
    assert set(report["linears"]) == linears
    save_quantized(model, tmp_path / "awq", report)
    assert stored_names(tmp_path / "awq") == stored_names(tmp_path / "float")
    plain = logits(load_dequantized(tmp_path / "awq"))
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.float32)
    assert distance(logits(loaded), plain) < 1e-4
    assert distance(plain, logits(model)) < 3e-3  # norms, biases and embeddings are stored in float16
    assert 0 < distance(plain, original) < 0.4


def stored_names(folder: Path) -> set[str]:
    """Names of the tensors in `folder`, a quantized linear under the one of its weight."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    packed = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    rest = {name for name in names if name.rpartition(".")[0] not in packed or name.endswith(".bias")}
    return rest | {f"{name}.weight" for name in packed}
