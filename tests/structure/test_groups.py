"""The groups that must be found are written here: a discovery that finds nothing fails."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm.inputs.capture import enter_model, lifted
from awq.structure.blocks import find_blocks
from awq.structure.groups import ScaleGroup, find_structure, fold
from tests.tiny import random_tokens, tiny_llama


class LayerNormMlp(nn.Module):
    """A block with a biased LayerNorm, a ReLU MLP and a residual."""

    def __init__(self, width: int = 16, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 3 * width)
        self.act = activation or nn.ReLU()
        self.fc2 = nn.Linear(3 * width, width)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return result


class ShiftedNormFused(nn.Module):
    """A (1 + w) norm before a fused gate_up."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = ShiftedNorm(width)
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm(x)).chunk(2, dim=-1)
        result: Tensor = x + self.down(nn.functional.silu(gate) * up)
        return result


class ShiftedNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Interleaved(nn.Module):
    """Attention with a fused qkv whose rows lie by key head: its queries, then its key, then its value."""

    def __init__(self, width: int = 16, heads: int = 4, key_heads: int = 2) -> None:
        super().__init__()
        self.head_size, self.key_heads, self.repeats = width // heads, key_heads, heads // key_heads
        self.qkv = nn.Linear(width, (heads + 2 * key_heads) * self.head_size)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        slots = self.qkv(x).unflatten(-1, (self.key_heads, self.repeats + 2, self.head_size)).movedim(1, 3)
        key, value = slots[:, :, -2:-1], slots[:, :, -1:]
        heads = nn.functional.scaled_dot_product_attention(slots[:, :, :-2], key, value)
        result: Tensor = x + self.out(heads.movedim(3, 1).flatten(2))
        return result


def structure_of(block: nn.Module, width: int = 16) -> Any:
    x = torch.randn(1, 12, width)
    with torch.no_grad():
        return find_structure(block, lambda: block(x))


def test_llama_groups() -> None:
    model = tiny_llama()
    prefix, blocks = find_blocks(model)
    assert prefix == "model.layers"
    with torch.no_grad():
        chunk = enter_model(model, blocks, random_tokens(1, 32), torch.device("cpu"))[0]
        for index, block in enumerate(blocks):
            structure = find_structure(block, lambda b=block, i=index: chunk.calls[i].run(b, chunk.hidden))
            assert structure.groups == (
                ScaleGroup("input_layernorm", "norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ScaleGroup("self_attn.v_proj", "linear", ("self_attn.o_proj",), 0, 2, 16),
                ScaleGroup("post_attention_layernorm", "norm", ("mlp.gate_proj", "mlp.up_proj")),
                ScaleGroup("mlp.up_proj", "linear", ("mlp.down_proj",)),
            )


def test_relu_mlp_behind_a_biased_layernorm() -> None:
    assert structure_of(LayerNormMlp()).groups == (
        ScaleGroup("norm", "norm", ("fc1",)),
        ScaleGroup("fc1", "linear", ("fc2",)),
    )


def test_a_fold_through_gelu_is_refused() -> None:
    assert structure_of(LayerNormMlp(activation=nn.GELU())).groups == (ScaleGroup("norm", "norm", ("fc1",)),)


def test_shifted_norm_and_fused_gate_up() -> None:
    assert structure_of(ShiftedNormFused()).groups == (
        ScaleGroup("norm", "norm_plus_one", ("gate_up",)),
        ScaleGroup("gate_up", "linear", ("down",), first_row=32),
    )


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_values_that_lie_among_queries_and_keys(key_heads: int) -> None:
    rows_before = (4 // key_heads + 1) * 4
    assert structure_of(Interleaved(key_heads=key_heads)).groups == (
        ScaleGroup("qkv", "linear", ("out",), rows_before, 4 // key_heads, 4, key_heads),
    )


def test_rows_are_a_view_of_every_part() -> None:
    group = ScaleGroup("qkv", "linear", ("out",), first_row=2, parts=2)
    values = torch.arange(6.0)
    assert group.rows(values).tolist() == [[2.0], [5.0]]
    group.rows(values).zero_()
    assert values.tolist() == [0, 1, 0, 3, 4, 0]


def test_the_probe_leaves_the_weights_as_they_were() -> None:
    block = LayerNormMlp()
    before = {name: p.clone() for name, p in block.named_parameters()}
    structure_of(block)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [LayerNormMlp(), ShiftedNormFused()])
def test_folding_leaves_the_output_unchanged(block: nn.Module, storage: torch.dtype) -> None:
    """Rounding the norm to its storage type is given to the consumers: the product stays exact."""
    x = torch.randn(1, 12, 16)
    with torch.no_grad():
        before = block(x)
        for group in structure_of(block).groups:
            weight = block.get_submodule(group.producer).weight
            scale = torch.rand(weight.shape[0] - group.first_row) + 0.5
            fold(block, group, scale, storage if isinstance(block, ShiftedNormFused) else torch.float32)
        assert (block(x) - before).norm() / before.norm() < 1e-5


def test_expand_and_reduce_are_grouped_query_heads() -> None:
    group = ScaleGroup("v", "linear", ("o",), repeats=3, head_dim=2)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert group.expand(scale).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert torch.equal(group.reduce(group.expand(scale)), scale)


def test_lifted_gives_back_dtype_and_device() -> None:
    block = LayerNormMlp().half()
    with lifted(block, torch.device("cpu")):
        assert {p.dtype for p in block.parameters()} == {torch.float32}
    assert {p.dtype for p in block.parameters()} == {torch.float16}
