"""The fused step with its kernels played by torch: weights put together, buffers between the kernels, their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.algorithm.search.affine import fit_affine
from awq.engine.cache import KVCache, windows_of
from awq.engine.fused import build as build_module
from awq.engine.fused import step as step_module
from awq.engine.fused.build import _merge, fused_step, most_rows, obstacle
from awq.engine.fused.discover import discover
from awq.engine.fused.merged import Merged
from awq.engine.fused.plan import ACTIVATIONS, Plan
from awq.engine.fused.reference import attend
from awq.engine.fused.step import FusedStep, Weights
from awq.engine.head import Int8Head
from awq.kernels.cuda.layout import Gpu, Units, units_to_dense
from awq.kernels.cuda.step import gemv as step_gemv
from awq.kernels.cuda.step.attention import Heads, splits_of
from awq.linear import QuantLinear
from awq.packing import Outliers, pack
from tests.engine.test_fused_plan import ROPES, distance, model_of, own, random_tokens
from tests.kernels.cuda.stub import prepared, stub_kernels

CPU = torch.device("cpu")
Launched = Callable[[int], None]


def weight_of(units: Units) -> Tensor:
    """With its kept channels."""
    weight = units_to_dense(units)
    if units.kept is not None and units.index is not None:
        used = units.index >= 0
        tiles = units.kept.view(len(units.kept), -1, 8, 4, 2, 2, 2)  # steps, r, c, half k, half rows, bit
        residual = tiles.permute(1, 4, 3, 6, 0, 5, 2).reshape(len(used), -1)[:, : units.out_features]
        weight[:, units.index[used].long()] += residual[used].float().t()
    return weight


def product(x: Tensor, units: Units, bias: Tensor | None) -> Tensor:
    y = x.float() @ weight_of(units).t()
    return y if bias is None else y + bias.float()


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def project(stream: Tensor, norm: Tensor, epsilon: float, units: Units, bias: Tensor | None, out: Tensor) -> Launched:
    def run(_: int) -> None:
        assert out.shape == (len(stream), units.out_features) and out.is_contiguous()
        out.copy_(product(normed(stream, norm, epsilon), units, bias))

    return run


def accumulate(x: Tensor, units: Units, bias: Tensor | None, stream: Tensor, factor: float) -> Launched:
    def run(_: int) -> None:
        stream.add_(factor * product(x, units, bias))

    return run


def gated(stream: Tensor, norm: Tensor, epsilon: float, units: Units, bias: Any, out: Tensor, name: str) -> Launched:
    def run(_: int) -> None:
        gate, up = product(normed(stream, norm, epsilon), units, bias).chunk(2, -1)
        out.copy_(ACTIVATIONS[name](gate) * up)

    return run


def attention(qkv: Tensor, heads: Heads, out: Tensor) -> Any:
    def turned(x: Tensor, norm: Any, position: int) -> Tensor:
        x = normed(x, norm.weight, norm.epsilon) if norm else x
        if heads.rope is None:
            return x
        half = heads.rope.shape[1]
        cosine, sine = heads.rope[position].unbind(-1)
        pairs = (
            [slice(0, 2 * half, 2), slice(1, 2 * half, 2)]
            if heads.interleaved
            else [slice(half), slice(half, 2 * half)]
        )
        a, b = x[:, pairs[0]].clone(), x[:, pairs[1]].clone()
        x = x.clone()
        x[:, pairs[0]], x[:, pairs[1]] = a * cosine - b * sine, b * cosine + a * sine
        return x

    def bind(
        keys: Tensor, values: Tensor, slot: Tensor, first: Tensor, position: Tensor, window: int | None, slots: int
    ) -> Launched:
        def run(_: int) -> None:
            now, size = int(slot), heads.head_dim
            assert now < slots <= keys.shape[2]
            at = ((heads.query_at, heads.heads), (heads.key_at, heads.key_heads), (heads.value_at, heads.key_heads))
            assert out.shape == (len(qkv), heads.heads * size) and out.is_contiguous()
            for row, place in enumerate(position.tolist()):
                if first[row] > now:  # padding, which the engine leaves to the prefill
                    out[row] = 0
                    continue
                query, key, value = (qkv[row, start : start + n * size].float().view(n, size) for start, n in at)
                keys[row, :, now] = turned(key, heads.key_norm, place)
                values[row, :, now] = value
                start = max(int(first[row]), now - window + 1 if window else 0)
                seen = (torch.arange(now + 1) >= start)[None, None, None]
                query = turned(query, heads.query_norm, place)[None, :, None]
                past = slice(row, row + 1), slice(None), slice(now + 1)
                out[row] = attend(query, keys[past], values[past], heads.scale, seen).flatten()

        return run

    return bind


def embed(table: Tensor, stream: Tensor, factor: float) -> Callable[[Tensor], Launched]:
    def bind(tokens: Tensor) -> Launched:
        def run(_: int) -> None:
            stream.copy_(table[tokens].float() * factor)

        return run

    return bind


def head(
    stream: Tensor, norm: Tensor, epsilon: float, weight: Tensor, bias: Any, logits: Tensor, factor: float, scales: Any
) -> Launched:
    def run(_: int) -> None:
        y = normed(stream, norm, epsilon) @ (weight.float() if scales is None else weight.float() * scales[:, None]).t()
        logits.copy_((y if bias is None else y + bias) * factor)

    return run


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for played in (project, accumulate, gated, attention, embed, head):
        monkeypatch.setattr(step_module, played.__name__, played)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    with stub_kernels(monkeypatch):
        yield


def quantized(model: Any, kept: int = 0, group: int = 32) -> Any:
    """The linears of its blocks as a GPU has them."""
    generator = torch.Generator().manual_seed(5)
    columns: dict[int, Tensor] = {}
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is output:
            continue
        grid, width = fit_affine(module.weight.data.float(), group, 4, zero_point=True), module.in_features
        outliers, bias = None, None if module.bias is None else module.bias.detach()
        if kept:
            index = columns.setdefault(width, torch.randperm(width, generator=generator)[:kept].sort().values.int())
            residual = 0.1 * torch.randn(kept, module.out_features, generator=generator)
            outliers = Outliers(index, residual.half())
        linear = QuantLinear(pack(grid.encode(module.weight.data.float()), grid.zeros, grid.scales), bias, outliers)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, prepared(linear))
    return model.requires_grad_(False)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-3": ("llama", {"rope_parameters": ROPES["llama3"] | {"rope_theta": 500000.0}, "attention_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "granite": ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0}),
}


def built(model: Any) -> FusedStep:
    plan = discover(model)
    assert isinstance(plan, Plan), plan
    assert obstacle(plan, CPU) is None
    weights = [_merge(layer) for layer in plan.layers]
    return FusedStep(plan, [each for each in weights if not isinstance(each, str)], max_batch=8)


def decoded(model: Any, step: FusedStep, tokens: Tensor, padding: Sequence[int] = (0,)) -> Tensor:
    """[slots, batch, vocabulary], with so many columns of padding before each row."""
    windows, config = windows_of(model.config), model.config
    assert isinstance(windows, list)
    batch, first = len(tokens), torch.tensor(padding)
    cache = KVCache(windows, batch, 256, CPU)
    cache.first.copy_(first)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = torch.zeros(batch, config.num_key_value_heads, 0, size, dtype=model.dtype)
    for layer in cache.parts:
        layer.lazy_initialization(empty, empty)
    logits = []
    for slot in range(tokens.shape[1]):
        cache.slot.fill_(slot)
        positions = (slot - first).clamp(min=0).unsqueeze(1)
        logits.append(step.decode(tokens[:, slot : slot + 1], positions, cache).clone())
    return torch.stack(logits)


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_the_model(name: str, kept: int) -> None:
    kind, settings = MODELS[name]
    model = quantized(model_of(kind, **settings).half(), kept)
    tokens = random_tokens(1, 14)
    before = own(model, tokens)
    step = built(model)
    assert distance(decoded(model, step, tokens), before) < 1e-2
    assert torch.equal(own(model, tokens), before)  # its linears are views now


@pytest.mark.parametrize("name", ["llama-3", "qwen3", "mistral"])
def test_rows_beside_each_other_are_rows_alone(name: str) -> None:
    kind, settings = MODELS[name]
    model = quantized(model_of(kind, **settings).half(), kept=3)
    step = built(model)
    for padding in ((0, 3, 1), (2,), (1, 0)):  # one after the other over the same buffers
        tokens = random_tokens(len(padding), 14)
        logits = decoded(model, step, tokens, padding)
        for row, first in enumerate(padding):
            assert distance(logits[first:, row], own(model, tokens[row : row + 1, first:])[:, 0]) < 1e-2


def weights_of(width: int, hidden: int, layers: int = 2) -> tuple[Any, list[Weights]]:
    """A plan and its weights by their sizes alone."""

    def merged(rows: int, columns: int) -> Merged:
        return Merged(Units(torch.empty(0), torch.empty(0), None, None, columns, rows, 128), None)

    shapes = ((3 * width, width), (width, width), (2 * hidden, width), (width, hidden))
    weights = [Weights(*(merged(*shape) for shape in shapes)) for _ in range(layers)]
    return SimpleNamespace(embedding=torch.empty(0, width)), weights


@pytest.mark.parametrize(
    ("sizes", "kib", "rows"),
    [
        ((4096, 11008), 227, 8),
        ((4096, 14336), 227, 8),
        ((8192, 28672), 227, 8),
        ((12288, 28672), 227, 5),
        ((4096, 14336), 99, 8),
        ((8192, 28672), 99, 4),
        ((8192, 28672), 64, 0),
        ((2048, 8192), 64, 7),
        ((8192, 8192), 64, 1),
    ],
)
def test_how_many_rows_fit(sizes: tuple[int, int], kib: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("sm_90a" if kib == 227 else "sm_120a", 132, 1024 * kib)
    for module in (build_module, step_gemv):
        monkeypatch.setattr(module, "gpu", lambda _: gpu)
    assert most_rows(*weights_of(*sizes), 0) == rows


def test_merged_linears_share_one_memory() -> None:
    model = quantized(model_of("llama").half(), kept=3)
    built(model)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
        for name in ("cuda_codes", "cuda_affine", "cuda_kept"):
            places = {linear.get_buffer(name).untyped_storage().data_ptr() for linear in linears}
            assert len(places) == 1 and all(linear.get_buffer(name).is_contiguous() for linear in linears)


def test_an_int8_head() -> None:
    model = quantized(model_of("qwen2").half())
    model.set_output_embeddings(Int8Head(model.lm_head.weight.detach()))
    tokens = random_tokens(1, 10)
    before = own(model, tokens)
    assert distance(decoded(model, built(model), tokens), before) < 1e-2


def test_what_the_kernels_do_not_take_is_told() -> None:
    assert "NVIDIA" in str(fused_step(model_of("llama")))
    plan = discover(model_of("llama"))
    assert isinstance(plan, Plan) and "not quantized" in str(obstacle(plan, CPU))
    plan = discover(quantized(model_of("llama")))
    assert isinstance(plan, Plan) and "dtypes" in str(obstacle(plan, CPU))  # float32, where kernels were asked for half
    model = quantized(model_of("llama").half())
    model.set_output_embeddings(nn.Linear(64, 96, bias=False))
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    plan = discover(model)
    assert isinstance(plan, Plan) and "half precision" in str(obstacle(plan, CPU))


def test_linears_that_keep_other_channels_do_not_go_together() -> None:
    model = quantized(model_of("llama").half(), kept=3)
    model.model.layers[0].mlp.up_proj.cuda_index[0] += 1
    plan = discover(model)
    assert isinstance(plan, Plan)
    assert "outlier channels" in str(_merge(plan.layers[0])) and not isinstance(_merge(plan.layers[1]), str)


def test_blocks_that_share_the_tokens_of_a_head() -> None:
    assert [splits_of(blocks, 132, 8192, 16) for blocks in (32, 8, 4, 1, 64, 66, 67, 200)] == [
        4,
        16,
        16,
        16,
        2,
        2,
        1,
        1,
    ]
    assert [splits_of(8, 132, slots, 16) for slots in (20, 256, 257, 512, 1024, 1536)] == [1, 1, 2, 2, 4, 8]
