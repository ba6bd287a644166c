"""The fused decode step on a GPU: each kernel against torch, the whole step against the models' own forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from awq.algorithm.search.affine import fit_affine
from awq.engine import attach
from awq.engine.cache import KVCache, windows_of
from awq.engine.fused.build import fused_step
from awq.engine.fused.plan import ACTIVATIONS
from awq.engine.fused.step import FusedStep
from awq.kernels.cuda.layout import to_units
from awq.kernels.cuda.step import attention, ends, gemv
from awq.kernels.cuda.step.attention import HeadNorm, Heads
from awq.kernels.cuda.step.launch import OLDEST
from awq.linear import QuantLinear
from awq.packing import pack
from tests.gpu.on_gpu import GPU, dtypes, packed_on_gpu, relative
from tests.kernels.plain import random_outliers

NEW = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not NEW, reason="needs compute capability 9.0")]

SHAPES = [
    (128, 64, 32, 0),
    (64, 128, 64, 2),
    (960, 576, 64, 5),
    (12288, 4096, 128, 0),
    (12288, 4096, 128, 40),
    (4096, 11008, 128, 110),
    (22016, 4096, 128, 0),
    (6144, 5120, 128, 7),
    (10240, 8192, 128, 0),
]
LIMIT = {torch.float16: 1e-3, torch.bfloat16: 7e-3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def enqueue(launch: Callable[[int], None]) -> None:
    launch(torch.cuda.current_stream().cuda_stream)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=GPU)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon) * weight


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_residual_and_gate_around_a_product(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, width, group, kept = shape
    packed = packed_on_gpu((rows, width, group), True)
    outliers = random_outliers(packed, kept).to(GPU) if kept else None
    units, weight = to_units(packed, outliers, GPU), packed.dequantize(torch.float32)
    weight = weight if outliers is None else outliers.add_to(weight)
    bias, norm = torch.randn(rows, device=GPU).to(dtype), 1 + 0.2 * torch.randn(width, device=GPU)
    for scale in (1.0, 1e-3):
        stream = scale * torch.randn(1, width, device=GPU)
        stream[0, width // 2] *= 100
        true = rms_norm(stream, norm, 1e-5) @ weight.t() + bias.float()
        y = poisoned(1, rows, dtype=dtype)
        enqueue(gemv.project(stream, norm, 1e-5, units, bias, y))
        assert relative(y, true) < LIMIT[dtype]
        if rows % 32:
            continue
        for name, activation in ACTIVATIONS.items():
            y = poisoned(1, rows // 2, dtype=dtype)
            enqueue(gemv.gated(stream, norm, 1e-5, units, bias, y, name))
            gate, up = true.chunk(2, -1)
            assert relative(y, activation(gate) * up) < 2 * LIMIT[dtype]
    x, stream = torch.randn(1, width, device=GPU).to(dtype), torch.randn(1, rows, device=GPU)
    before = stream.clone()
    enqueue(gemv.accumulate(x, units, bias, stream, 0.5))
    assert relative(stream - before, 0.5 * (x.float() @ weight.t() + bias.float())) < LIMIT[dtype]


SEVERAL = [
    (128, 64, 32, 0, 8),
    (64, 128, 64, 2, 5),
    (960, 576, 64, 5, 3),
    (4096, 4096, 128, 40, 8),
    (22016, 4096, 128, 0, 8),
    (4096, 11008, 128, 110, 8),
    (4096, 11008, 128, 0, 4),
    (4096, 14336, 128, 7, 6),
    (6144, 5120, 128, 7, 2),
    (10240, 8192, 128, 0, 8),
    (8192, 28672, 128, 0, 7),
]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_several_rows(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Rows of sizes a million apart: each is as good as alone. Nothing beyond the last is written."""
    rows, width, group, kept, count = shape
    packed = packed_on_gpu((rows, width, group), True)
    outliers = random_outliers(packed, kept).to(GPU) if kept else None
    units, weight = to_units(packed, outliers, GPU), packed.dequantize(torch.float32)
    weight = weight if outliers is None else outliers.add_to(weight)
    bias, norm = torch.randn(rows, device=GPU).to(dtype), 1 + 0.2 * torch.randn(width, device=GPU)
    stream = torch.randn(count, width, device=GPU) * torch.logspace(-3, 3, count, device=GPU).unsqueeze(1)
    stream[:, width // 2] *= 100
    if gemv.fits(units, 0, count):
        true = rms_norm(stream, norm, 1e-5) @ weight.t() + bias.float()
        y = poisoned(count, rows, dtype=dtype)
        enqueue(gemv.project(stream, norm, 1e-5, units, bias, y))
        assert worst_row(y, true) < LIMIT[dtype]
        for name, activation in ACTIVATIONS.items():
            y = poisoned(count, rows // 2, dtype=dtype)
            enqueue(gemv.gated(stream, norm, 1e-5, units, bias, y, name))
            gate, up = true.chunk(2, -1)
            assert worst_row(y, activation(gate) * up) < 2 * LIMIT[dtype]
    x, buffer = torch.randn(count, width, device=GPU).to(dtype), torch.randn(count + 1, rows, device=GPU)
    before, stream = buffer.clone(), buffer[:count]
    add = gemv.accumulate(x, units, bias, stream, 0.5)
    enqueue(add)
    assert worst_row(stream - before[:count], 0.5 * (x.float() @ weight.t() + bias.float())) < LIMIT[dtype]
    assert torch.equal(buffer[count], before[count])
    first = buffer.clone()
    for _ in range(20):  # the same sums each time
        buffer.copy_(before)
        enqueue(add)
        assert torch.equal(buffer, first)


def worst_row(y: Tensor, true: Tensor) -> float:
    return max(relative(*pair) for pair in zip(y, true, strict=True))


HEADS = [
    (32, 32, 128),
    (32, 8, 128),
    (9, 3, 64),
    (14, 2, 64),
    (32, 2, 128),
    (4, 2, 16),
    (4, 1, 96),
    (8, 4, 256),
    (4, 2, 80),
]
# slot, first, window, turning share, interleaved, norms
PLACES: list[tuple[int, int, int | None, float, bool, bool]] = [
    (0, 0, None, 1, False, False),
    (16, 0, None, 1, True, True),
    (131, 7, None, 0.5, False, False),
    (500, 0, 100, 1, False, False),
    (599, 33, 577, 1, True, True),
    (599, 0, None, 0, False, False),
]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("batch", [1, 3, 33])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention(heads: tuple[int, int, int], batch: int, dtype: torch.dtype) -> None:
    attends(heads, batch, dtype, 600, PLACES)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(
    "heads", [(32, 8, 128), (64, 8, 128), (28, 4, 128), (9, 3, 64), (4, 2, 16), (8, 4, 256)], ids=str
)
def test_attention_over_long_text(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Up to 16 blocks share a head's tokens, and one or two halves of the last put them together."""
    places = [(slot, first, None, 1.0, False, False) for slot, first in ((1500, 0), (1700, 5), (4599, 0), (4599, 3000))]
    attends(heads, 1, dtype, 4600, places)


def attends(
    heads: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype,
    slots: int,
    places: list[tuple[int, int, int | None, float, bool, bool]],
) -> None:
    queries, key_heads, size = heads
    for slot, first, window, share, interleaved, normed in places:
        shape = (batch, key_heads, slots, size)
        keys, values = poisoned(*shape, dtype=dtype), poisoned(*shape, dtype=dtype)
        keys[:, :, :slot].normal_(), values[:, :, :slot].normal_()
        old_keys, old_values = keys.clone(), values.clone()
        qkv = torch.randn(batch, (queries + 2 * key_heads) * size, device=GPU).to(dtype)
        rotary = int(size * share) // 2 * 2
        angles = 6 * torch.rand(slots, rotary // 2, device=GPU)
        rope = torch.stack([angles.cos(), angles.sin()], -1).contiguous() if rotary else None
        norms = [HeadNorm(1 + 0.1 * torch.randn(size, device=GPU), 1e-6) if normed else None for _ in range(2)]
        at = (0, queries * size, (queries + key_heads) * size)
        plan = Heads(queries, key_heads, size, *at, size**-0.5, rope, interleaved, *norms)
        y = poisoned(batch, queries * size, dtype=dtype)
        numbers = [torch.tensor([number] * batch, device=GPU) for number in (slot, first, slot - first)]
        bind = attention.attention(qkv, plan, y)
        launch = bind(keys, values, numbers[0][:1], *numbers[1:], window, slots)
        enqueue(launch)
        once = y.clone()
        enqueue(launch)  # finds the memory between blocks as the first did
        assert torch.equal(y, once)

        query, key, value = (part.unflatten(-1, (-1, size)) for part in qkv.tensor_split(at[1:], dim=-1))
        query, key = (
            turned(part, norm, None if rope is None else rope[slot - first], interleaved)
            for part, norm in zip((query, key), norms, strict=True)
        )
        old_keys[:, :, slot], old_values[:, :, slot] = key.to(dtype), value
        assert relative(keys[:, :, slot], key) < LIMIT[dtype]
        keys[:, :, slot] = old_keys[:, :, slot]
        same = [
            torch.equal(new.nan_to_num(7), old.nan_to_num(7)) for new, old in ((keys, old_keys), (values, old_values))
        ]
        assert all(same)
        seen = slice(max(first, slot - window + 1 if window else 0), slot + 1)
        group = queries // key_heads
        known, summed = (t[:, :, seen].float().repeat_interleave(group, 1) for t in (old_keys, old_values))
        scores = (known @ query.to(dtype).float().unsqueeze(-1)).squeeze(-1) * size**-0.5
        true = (scores.softmax(-1).unsqueeze(2) @ summed).flatten(1)
        assert relative(y, true) < 2 * LIMIT[dtype]


def turned(x: Tensor, norm: HeadNorm | None, table: Tensor | None, interleaved: bool) -> Tensor:
    """[batch, heads, size] with its norm and RoPE, float32."""
    x = x.float() if norm is None else rms_norm(x, norm.weight, norm.epsilon)
    if table is None:
        return x
    half = len(table)
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    parts = (a * table[:, 0] - b * table[:, 1], b * table[:, 0] + a * table[:, 1])
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([joined, rest], -1)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("batch", [1, 5, 8])
@pytest.mark.parametrize("shape", [(32000, 4096), (49152, 576), (97, 64), (1000, 896)], ids=str)
def test_embedding_and_head(shape: tuple[int, int], batch: int, dtype: torch.dtype) -> None:
    vocabulary, width = shape
    weight = (torch.randn(shape, device=GPU) / width**0.5).to(dtype)
    tokens, stream = torch.randint(vocabulary, (batch,), device=GPU), poisoned(batch, width, dtype=torch.float32)
    enqueue(ends.embed(weight, stream, 2.0)(tokens))
    assert torch.equal(stream, weight[tokens].float() * 2)
    norm, bias = 1 + 0.2 * torch.randn(width, device=GPU), torch.randn(vocabulary, device=GPU)
    x, logits = rms_norm(stream, norm, 1e-5), poisoned(batch, vocabulary, dtype=torch.float32)
    enqueue(ends.head(stream, norm, 1e-5, weight, bias, logits, 0.5))
    assert relative(logits, 0.5 * (x @ weight.float().t() + bias)) < LIMIT[dtype]
    codes, scales = ends.to_int8(weight)
    enqueue(ends.head(stream, norm, 1e-5, codes, None, logits, 1.0, scales))
    assert relative(logits, x @ (codes.float() * scales.unsqueeze(1)).t()) < 1e-3


BASE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": (
        "llama",
        {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "Llama-2": ("llama", {"num_key_value_heads": 4}),
    "Llama-3": ("llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA_3}),
    "Qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 128}),
    "Mistral": ("mistral", {"sliding_window": 9}),
    "Phi-3": ("phi3", {}),
    "Gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 256}),
}


def quantized_model(name: str, dtype: torch.dtype, kept: int = 0, version: str | None = None) -> Any:
    kind, settings = MODELS[name]
    with GPU:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **BASE | settings), dtype=dtype)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2) if parameter.ndim == 1 else parameter.mul_(3)
    for place, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        weight = module.weight.float()
        grid = fit_affine(weight, 64, 4, zero_point=True)
        packed = pack(grid.encode(weight), grid.zeros, grid.scales)
        outliers = random_outliers(packed, kept).to(GPU) if kept else None
        linear = QuantLinear(packed, module.bias, outliers)
        linear.prepare(version, dtype=dtype)
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


@torch.inference_mode()
def decoded(
    model: Any, step: FusedStep, tokens: Tensor, run: Callable[..., Tensor], padding: Sequence[int] = (0,)
) -> Tensor:
    """[batch, slots, vocabulary], with so many columns of padding before each row."""
    batch, first = len(tokens), torch.tensor(padding, device=GPU)
    windows, config = windows_of(model.config), model.config
    assert isinstance(windows, list)
    cache = KVCache(windows, batch, 256, GPU)
    cache.first.copy_(first)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = torch.zeros(batch, config.num_key_value_heads, 0, size, dtype=model.dtype, device=GPU)
    for layer in cache.parts:
        layer.lazy_initialization(empty, empty)
    logits = []
    for slot in range(tokens.shape[1]):
        cache.slot.fill_(slot), cache.positions.copy_((slot - first).clamp(min=0).unsqueeze(1))
        cache.tokens.copy_(tokens[:, slot : slot + 1])
        logits.append(run(cache, lambda: step.decode(cache.tokens, cache.positions, cache)).clone())
    return torch.stack(logits, dim=1)


def plain_run(_: KVCache, work: Callable[[], Tensor]) -> Tensor:
    return work()


def captured_run(cache: KVCache, work: Callable[[], Tensor]) -> Tensor:
    result: Tensor = cache.graphs.run("step", work)
    return result


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("name", MODELS)
def test_the_step_is_the_model(name: str, dtype: torch.dtype) -> None:
    model = quantized_model(name, dtype)
    tokens = torch.randint(3, 1000, (1, 40), device=GPU)
    with torch.inference_mode():
        true = model(input_ids=tokens).logits[0].float()
    step = fused_step(model)
    assert isinstance(step, FusedStep), step
    first = decoded(model, step, tokens, plain_run)[0]
    limit = 1e-2 if dtype == torch.float16 else 6e-2  # the model's own residual stream is rounded, the step's is not
    assert relative(first, true) < limit
    assert torch.equal(decoded(model, step, tokens, captured_run)[0], first)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tokens).logits[0].float(), true)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("name", ["Llama-2", "Llama-3", "Qwen3", "Mistral", "Gemma"])
def test_rows_beside_each_other_are_rows_alone(name: str, dtype: torch.dtype) -> None:
    model = quantized_model(name, dtype)
    step = fused_step(model)
    assert isinstance(step, FusedStep) and step.max_batch == 8
    limit = 1e-2 if dtype == torch.float16 else 6e-2
    for padding in ((0, 0, 0, 0, 0, 0, 0, 0), (0, 5), (3, 0, 9), (1, 7, 0, 2, 11, 3, 0, 5)):
        tokens = torch.randint(3, 1000, (len(padding), 40), device=GPU)
        found = decoded(model, step, tokens, plain_run, padding)
        captured = decoded(model, step, tokens, captured_run, padding)
        for row, first in enumerate(padding):  # a row's padding has nothing to attend to: its logits mean nothing
            assert torch.equal(captured[row, first:], found[row, first:])
            with torch.inference_mode():
                true = model(input_ids=tokens[row : row + 1, first:]).logits[0].float()
            assert relative(found[row, first:], true) < limit


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("name", ["Llama-3", "Qwen2.5"])
def test_generate_of_a_batch_is_that_of_its_rows(name: str, batch: int) -> None:
    model = quantized_model(name, torch.float16)
    engine = attach(model).engine
    assert [engine.tier_of(rows) for rows in (1, batch, 9)] == [2, 2, 2], engine
    tokens, mask = torch.randint(3, 1000, (batch, 20), device=GPU), torch.ones(batch, 20, dtype=torch.int64, device=GPU)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(tokens, attention_mask=mask, **settings)
    for row in range(batch):
        with torch.inference_mode():
            logits = model(input_ids=answer[row : row + 1, 2 * row :]).logits[0, 19 - 2 * row : -1].float()
        chosen = logits.gather(1, answer[row, 20:, None]).squeeze(1)
        assert bool((chosen >= logits.amax(1) - 0.02 * logits.abs().amax()).all())  # ties may fall either way


@pytest.mark.parametrize("name", MODELS)
def test_generate_takes_the_fused_step(name: str) -> None:
    model = quantized_model(name, torch.float16)
    assert attach(model).engine.tier == 2, model.engine
    tokens = torch.randint(3, 1000, (1, 20), device=GPU)
    answer = model.generate(tokens, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        logits = model(input_ids=answer).logits[0, 19:-1].float()
    chosen = logits.gather(1, answer[0, 20:, None]).squeeze(1)
    assert bool((chosen >= logits.amax(1) - 0.02 * logits.abs().amax()).all())  # ties may fall either way
