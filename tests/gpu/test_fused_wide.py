"""The fused pass of many rows on a GPU: each kernel against torch, prompts and steps against the model's forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.engine import attach
from awq.engine.attention import prompt_attention
from awq.engine.cache import KVCache, windows_of
from awq.engine.fused.build import fused_step
from awq.engine.fused.plan import ACTIVATIONS
from awq.engine.fused.reference import attend
from awq.engine.fused.step import FusedStep
from awq.engine.fused.wide import WideStep
from awq.kernels.cuda.step import wide
from awq.kernels.cuda.step.attention import HeadNorm, Heads
from awq.kernels.cuda.step.launch import OLDEST
from tests.gpu.on_gpu import GPU, dtypes, relative
from tests.gpu.test_fused_step import HEADS, LIMIT, captured_run, plain_run, poisoned, quantized_model, rms_norm, turned

NEW = torch.cuda.is_available() and torch.cuda.get_device_capability() >= OLDEST
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not NEW, reason="needs compute capability 9.0")]
SLOTS = 512
OFF = {torch.float16: 1e-2, torch.bfloat16: 6e-2}  # as of the step of few rows


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("width", [64, 576, 4096, 5120, 8192, 12288, 16384])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_residual_stream_and_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    """Rows of sizes a million apart; the same again, of every third row."""
    stream = torch.randn(3 * rows, width, device=GPU) * torch.logspace(-3, 3, 3 * rows, device=GPU).unsqueeze(1)
    y, norm = torch.randn_like(stream).to(dtype), 1 + 0.2 * torch.randn(width, device=GPU)
    before, x = stream.clone(), poisoned(3 * rows, width, dtype=dtype)
    wide.add_and_norm(stream, None, 0.0, norm, 1e-5, x)
    assert relative(x, rms_norm(before, norm, 1e-5)) < LIMIT[dtype] and torch.equal(stream, before)
    wide.add_and_norm(stream, y, 0.5, norm, 1e-5, x)
    true = before + 0.5 * y.float()
    assert relative(stream, true) < 1e-6
    assert relative(x, rms_norm(true, norm, 1e-5)) < LIMIT[dtype]
    for at in (2, torch.tensor([2], device=GPU)):
        stream.copy_(before)
        some = poisoned(rows, width, dtype=dtype)
        wide.add_and_norm(stream, y, 0.5, norm, 1e-5, some, 3, at)
        assert torch.equal(some, x[2::3])


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 64), (9, 2056), (300, 11008)], ids=str)
def test_gate(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    rows, width = shape
    projected, out = (4 * torch.randn(rows, 2 * width, device=GPU)).to(dtype), poisoned(rows, width, dtype=dtype)
    wide.gate(projected, name, out)
    half, up = projected.float().chunk(2, -1)
    assert relative(out, ACTIVATIONS[name](half) * up) < LIMIT[dtype]


# batch, new tokens, past, first, turning share, interleaved, norms
PLACES: list[tuple[int, int, int, Sequence[int], float, bool, bool]] = [
    (1, 1, 0, [0], 1, False, False),
    (2, 17, 5, [0, 7], 1, True, True),
    (3, 200, 0, [0, 33, 0], 0.5, False, True),
    (1, 600, 100, [0], 1, False, False),
    (2, 9, 3, [0, 1], 0, False, False),
]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_queries_keys_and_values_of_a_prompt(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    queries, key_heads, size = heads
    for batch, new, past, first, share, interleaved, normed in PLACES:
        slots, rotary = past + new + 3, int(size * share) // 2 * 2
        angles = 6 * torch.rand(slots, rotary // 2, device=GPU)
        rope = torch.stack([angles.cos(), angles.sin()], -1).contiguous() if rotary else None
        norms = [HeadNorm(1 + 0.1 * torch.randn(size, device=GPU), 1e-6) if normed else None for _ in range(2)]
        at = (0, queries * size, (queries + key_heads) * size)
        plan = Heads(queries, key_heads, size, *at, 1.0, rope, interleaved, *norms)
        qkv = torch.randn(batch * new, (queries + 2 * key_heads) * size, device=GPU).to(dtype)
        given = qkv.view(batch, new, -1, size).clone()
        keys, values = (poisoned(batch, key_heads, slots, size, dtype=dtype) for _ in range(2))
        wide.place(qkv, plan, keys, values, torch.tensor(first, device=GPU), past)
        made, filled = qkv.view(batch, new, -1, size), slice(past, past + new)
        for row in range(batch):
            for column in {0, new // 2, new - 1}:
                table = None if rope is None else rope[max(0, past + column - first[row])]
                query, key = given[row, column, :queries], given[row, column, queries : queries + key_heads]
                assert relative(made[row, column, :queries], turned(query, norms[0], table, interleaved)) < LIMIT[dtype]
                found = keys[row, :, past + column]
                assert relative(found, turned(key, norms[1], table, interleaved)) < LIMIT[dtype]
        assert torch.equal(values[:, :, filled], given[:, :, queries + key_heads :].transpose(1, 2))
        assert bool(torch.isfinite(keys[:, :, filled]).all())
        for cache in (keys, values):  # nothing else was written
            assert int(cache.isnan().sum()) == cache.numel() * (slots - new) // slots
        assert torch.equal(made[:, :, queries:], given[:, :, queries:])


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("heads", [(4, 4, 128), (8, 2, 64), (4, 1, 256), (4, 2, 80), (4, 2, 16)], ids=str)
def test_attention_of_a_prompt(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    queries, key_heads, size = heads
    cases: list[tuple[int, int, int | None, tuple[int, ...]]] = [
        (1, 0, None, ()),
        (17, 0, None, (0, 5)),
        (300, 0, None, ()),
        (300, 40, None, (3, 50)),
        (1, 200, None, ()),
        (300, 40, 100, ()),
        (20, 300, 1000, (0, 310)),
    ]
    for new, past, window, padding in cases:
        total = past + new
        query = torch.randn(2, new, queries, size, device=GPU).to(dtype).transpose(1, 2)
        keys, values = (torch.randn(2, key_heads, total + 9, size, device=GPU).to(dtype)[:, :, :total] for _ in "kv")
        y = prompt_attention(query, keys, values, size**-0.5, window, padding)
        at = torch.arange(total, device=GPU)
        apart = at[-new:, None] - at
        for row, first in enumerate(padding or (0, 0)):
            seen = (apart >= 0) & (apart < (window or total)) & (at >= first)
            some, one = slice(max(0, first - past), None), slice(row, row + 1)
            true = attend(query[one], keys[one], values[one], size**-0.5, seen[None, None]).view(new, queries, size)
            assert relative(y[row].transpose(0, 1)[some], true[some]) < 2 * LIMIT[dtype]


def wide_of(model: Any) -> WideStep:
    step = fused_step(model)
    assert isinstance(step, FusedStep) and step.wider is not None, step
    return step.wider


def cache_of(model: Any, batch: int, padding: Sequence[int] = ()) -> KVCache:
    windows = windows_of(model.config)
    assert isinstance(windows, list)
    cache = KVCache(windows, batch, SLOTS, GPU)
    if padding:
        cache.first.copy_(torch.tensor(padding))
    return cache


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """float32 [batch, tokens, vocabulary]"""
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits.float()
    return logits


# Of the model, and the input channels that it keeps: q/k norms, biases, windows, widths of heads.
MODELS = [("Llama-2", 0), ("Llama-3", 3), ("Qwen2.5", 0), ("Qwen3", 20), ("Mistral", 0), ("Phi-3", 5), ("Gemma", 0)]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("name", "kept"), MODELS)
def test_prompts_are_the_models(name: str, kept: int, dtype: torch.dtype) -> None:
    """Of every length, plainly and captured, with what is in the cache or without."""
    model = quantized_model(name, dtype, kept)
    step = wide_of(model)
    tokens = torch.randint(3, 1000, (2, 340), device=GPU)
    true = logits_of(model, tokens)
    for length in (1, 2, 17, 128, 300):
        cache = cache_of(model, 2)
        with torch.inference_mode():
            first = step.prompt(tokens[:, :length], cache)
            second = step.prompt(tokens[:, length : length + 40], cache, length)
        assert relative(first, true[:, length - 1]) < OFF[dtype]
        assert relative(second, true[:, length + 39]) < OFF[dtype]
        behind = tokens[:, : length + 15]  # a graph of one length serves shorter prompts
        cache.last.fill_(length - 1)
        with torch.inference_mode():
            for _ in range(3):
                found = cache.graphs.run(length, lambda: step.prompt(behind, cache, last=cache.last))  # noqa: B023
                assert relative(found, true[:, length - 1]) < OFF[dtype]
    assert torch.equal(logits_of(model, tokens), true)


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize(("name", "kept"), MODELS)
@pytest.mark.parametrize("batch", [1, 3, 9, 16, 33])
def test_steps_after_a_prompt_with_padding(batch: int, name: str, kept: int, dtype: torch.dtype) -> None:
    model = quantized_model(name, dtype, kept)
    step, prompt, steps = wide_of(model), 30, 8
    step.rows = 200  # type: ignore[misc]  # prompts of some rows after those of others
    padding = [7 * row % 29 for row in range(batch)]
    tokens = torch.randint(3, 1000, (batch, prompt + steps), device=GPU)
    true = [logits_of(model, tokens[row : row + 1, first:])[0] for row, first in enumerate(padding)]
    found = []
    for run in (plain_run, captured_run):
        cache = cache_of(model, batch, padding)
        with torch.inference_mode():
            logits = [step.prompt(tokens[:, :prompt], cache, padding=padding)]
            for slot in range(prompt, prompt + steps):
                cache.slot.fill_(slot), cache.positions.copy_((slot - cache.first).unsqueeze(1))
                cache.tokens.copy_(tokens[:, slot, None])
                logits.append(run(cache, lambda: step.decode(cache.tokens, cache.positions, cache)).clone())  # noqa: B023
        found.append(torch.stack(logits, 1).float())
    assert torch.equal(*found)
    for row, first in enumerate(padding):
        assert relative(found[0][row], true[row][prompt - first - 1 :]) < OFF[dtype]


def test_long_prompts_go_in_parts() -> None:
    model = quantized_model("Llama-3", torch.float16)
    step, tokens = wide_of(model), torch.randint(3, 1000, (2, 300), device=GPU)
    step.rows = 128  # type: ignore[misc]
    with torch.inference_mode():
        found = step.prompt(tokens, cache_of(model, 2, (0, 40)), padding=(0, 40))
    for row, first in enumerate((0, 40)):
        assert relative(found[row], logits_of(model, tokens[row : row + 1, first:])[0, -1]) < OFF[torch.float16]


SETTINGS: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def likely(model: Any, answer: Tensor, prompt: int) -> bool:
    """Whether each new token is one that the model itself could have chosen: ties may fall either way."""
    logits = logits_of(model, answer[None])[0, prompt - 1 : -1]
    chosen = logits.gather(1, answer[prompt:, None]).squeeze(1)
    return bool((chosen >= logits.amax(1) - 0.02 * logits.abs().amax()).all())


@pytest.mark.parametrize("length", [1, 2, 17, 128, 300])
@pytest.mark.parametrize("batch", [1, 9, 33])
def test_generate(batch: int, length: int) -> None:
    model = attach(quantized_model("Qwen3", torch.float16))
    assert model.engine.tier_of(batch) == 2 and "not" not in str(model.engine), model.engine
    assert model.engine.ways.prompts is not None
    for _ in range(3):  # plainly, recorded, replayed
        tokens = torch.randint(3, 1000, (batch, length), device=GPU)
        answer = model.generate(tokens, return_dict_in_generate=True, **SETTINGS)
        assert all(likely(model, row, length) for row in answer.sequences)
    longer = torch.cat([answer.sequences, torch.randint(3, 1000, (batch, 5), device=GPU)], 1)
    # Without a mask transformers takes a 0 among the answers for padding.
    shown = {"past_key_values": answer.past_key_values, "attention_mask": torch.ones_like(longer)}
    longer = model.generate(longer, **shown, **SETTINGS)
    assert all(likely(model, row, length + 25) for row in longer)
    mask = torch.ones_like(tokens)
    for row in range(batch):
        mask[row, : row % length] = 0
    answer = model.generate(tokens, attention_mask=mask, **SETTINGS)
    assert all(likely(model, row[number % length :], length - number % length) for number, row in enumerate(answer))


def test_a_pinned_version_is_kept() -> None:
    step = fused_step(quantized_model("Llama-2", torch.float16, version="GEMM"))
    assert isinstance(step, WideStep)
    step = fused_step(quantized_model("Llama-2", torch.float16, version="GEMV"))
    assert isinstance(step, FusedStep) and step.wider is None
    model = attach(quantized_model("Llama-2", torch.float16, version="GEMM"))
    assert [model.engine.tier_of(batch) for batch in (1, 9)] == [2, 2]
    tokens = torch.randint(3, 1000, (1, 20), device=GPU)
    assert likely(model, model.generate(tokens, **SETTINGS)[0], 20)
