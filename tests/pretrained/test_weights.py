"""The model read block by block is the model that transformers loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from awq.errors import CheckpointError
from awq.pretrained.source import Source, find_source
from awq.pretrained.weights import DiskWeights, obstacle, open_outline
from awq.structure.blocks import find_blocks
from tests.architectures.families import FAMILIES, Family, tiny
from tests.architectures.moe import MIXTURES
from tests.tiny import save_tiny, tiny_llama

CPU = torch.device("cpu")
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=str(family), marks=() if family.core else pytest.mark.slow)
        for family in [*FAMILIES, *(mixture.family for mixture in MIXTURES)]
    ],
)


def opened(source: Source) -> tuple[Any, DiskWeights]:
    model = open_outline(source)
    blocks, _ = find_blocks(model)
    assert obstacle(source, model, blocks) is None
    return model, DiskWeights(source, model, blocks, CPU, lambda _name: None)


def same(part: nn.Module, other: nn.Module) -> bool:
    mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (part, other))
    return mine.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in mine.items()
    )


@every_family
def test_block_by_block_it_is_the_model_that_transformers_loads(family: Family, tmp_path: Path) -> None:
    if family.model_class() is None:
        pytest.skip(f"this transformers has no {family.name}ForCausalLM")
    tiny(family).save_pretrained(tmp_path)
    source = find_source(tmp_path)
    whole, (model, weights) = source.load(), opened(source)
    assert all(parameter.is_meta for parameter in model.parameters())
    with weights:
        name, blocks = find_blocks(whole)
        for index, block in enumerate(blocks):
            with weights.block(index):
                assert same(model.get_submodule(name)[index], block)
            assert all(parameter.is_meta for parameter in model.get_submodule(name).parameters())
        with weights.enter():
            for part in (whole, model):
                part.set_submodule(name, nn.ModuleList())
            assert same(model, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_are_one_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    source = find_source(save_tiny(tmp_path, tiny_llama(tie_word_embeddings=True), dtype))
    model, weights = opened(source)
    with weights, weights.enter():
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.dtype == dtype


def test_the_next_block_is_read_ahead_and_no_other(tmp_path: Path) -> None:
    _, weights = opened(find_source(save_tiny(tmp_path, tiny_llama(num_hidden_layers=4))))
    with weights:
        with weights.block(1):
            assert list(weights._ahead) == [2]
            assert len(weights._ahead[2].result()) == 9
        with weights.block(2):
            assert list(weights._ahead) == [3]


def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    _, weights = opened(find_source(save_tiny(tmp_path)))
    with weights:
        with weights.block(0):
            weights._ahead[1].result()
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with (
            pytest.raises(CheckpointError, match=r"model\.safetensors has changed since the run began"),
            weights.block(0),
        ):
            pass


def test_blocks_that_share_weights_are_not_read_one_by_one(tmp_path: Path) -> None:
    source = find_source(save_tiny(tmp_path))
    model = open_outline(source)
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    assert obstacle(source, model, "model.layers") == "its blocks share weights"
