"""The fused pass of many rows with its kernels played by torch: what goes where, in what order, and who gets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.engine import attach
from awq.engine.attention import prompt_attention
from awq.engine.cache import KVCache, windows_of
from awq.engine.choose import Probe
from awq.engine.fused import wide as wide_module
from awq.engine.fused.build import _merge
from awq.engine.fused.discover import discover
from awq.engine.fused.plan import ACTIVATIONS, Plan
from awq.engine.fused.reference import attend
from awq.engine.fused.wide import WideStep
from awq.engine.head import Int8Head
from awq.engine.query import read_text
from awq.kernels.cuda.layout import Gpu, Units
from awq.kernels.cuda.step.attention import Heads
from tests.engine.test_fused_plan import ROPES, distance, model_of, own, random_tokens
from tests.engine.test_fused_step import MODELS, attention, embed, normed, product, quantized
from tests.kernels.cuda.stub import stub_kernels

CPU = torch.device("cpu")


def gemm(x: Tensor, units: Units, bias: Tensor | None, out: Tensor) -> None:
    assert x.is_contiguous() and out.is_contiguous() and out.shape == (len(x), units.out_features)
    out.copy_(product(x, units, bias))


def add_and_norm(
    stream: Tensor,
    y: Tensor | None,
    factor: float,
    norm: Tensor,
    epsilon: float,
    x: Tensor,
    each: int = 1,
    at: int | Tensor = 0,
) -> None:
    assert stream.dtype == torch.float32 and x.is_contiguous() and len(stream) == each * len(x)
    some = torch.arange(len(x)) * each + int(at)
    if y is not None:
        stream[some] += factor * y[some].float()
    x.copy_(normed(stream[some], norm, epsilon))


def gate(projected: Tensor, activation: str, out: Tensor) -> None:
    half, up = projected.float().chunk(2, -1)
    out.copy_(ACTIVATIONS[activation](half) * up)


def place(qkv: Tensor, heads: Heads, keys: Tensor, values: Tensor, first: Tensor, past: int) -> None:
    """Token by token."""
    rows, columns = len(keys), len(qkv) // len(keys)
    size, after = heads.head_dim, past + columns
    assert keys.shape[2] >= after and len(first) == rows
    for row in range(rows):
        for column in range(columns):
            token, slot = qkv[row * columns + column], past + column
            position = max(0, slot - int(first[row]))
            for at, count, norm, cache in (
                (heads.query_at, heads.heads, heads.query_norm, None),
                (heads.key_at, heads.key_heads, heads.key_norm, keys),
                (heads.value_at, heads.key_heads, None, values),
            ):
                part = token[at : at + count * size].view(count, size)
                made = part.float() if cache is values else turned(part.float(), norm, heads, position)
                (part if cache is None else cache[row, :, slot]).copy_(made)


def turned(x: Tensor, norm: Any, heads: Heads, position: int) -> Tensor:
    x = normed(x, norm.weight, norm.epsilon) if norm else x
    if heads.rope is None:
        return x
    half, table = heads.rope.shape[1], heads.rope[position]
    turning, rest = x[:, : 2 * half], x[:, 2 * half :]
    a, b = (turning[:, ::2], turning[:, 1::2]) if heads.interleaved else turning.chunk(2, -1)
    parts = (a * table[:, 0] - b * table[:, 1], b * table[:, 0] + a * table[:, 1])
    made = torch.stack(parts, -1).flatten(1) if heads.interleaved else torch.cat(parts, -1)
    return torch.cat([made, rest], -1)


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for played in (gemm, add_and_norm, gate, place, embed):
        monkeypatch.setattr(wide_module, played.__name__, played)
    monkeypatch.setattr(wide_module, "attention", lambda qkv, heads, out, shares: attention(qkv, heads, out))
    monkeypatch.setattr(wide_module, "gpu", lambda device: Gpu("sm_90a", 132, 227 << 10))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    with stub_kernels(monkeypatch):
        yield


def built(model: Any) -> WideStep:
    plan = discover(model)
    assert isinstance(plan, Plan), plan
    weights = [_merge(layer) for layer in plan.layers]
    return WideStep(plan, [each for each in weights if not isinstance(each, str)])


def cache_of(model: Any, batch: int, padding: Sequence[int] = ()) -> KVCache:
    windows = windows_of(model.config)
    assert isinstance(windows, list)
    cache = KVCache(windows, batch, 256, CPU)
    if padding:
        cache.first.copy_(torch.tensor(padding))
    return cache


def model_named(name: str, **more: Any) -> Any:
    kind, settings = MODELS[name]
    return quantized(model_of(kind, **settings).half(), **more)


@torch.inference_mode()
def decoded(step: WideStep, cache: KVCache, tokens: Tensor, past: int) -> Tensor:
    """[slots, batch, vocabulary]"""
    logits = []
    for slot in range(past, past + tokens.shape[1]):
        cache.slot.fill_(slot)
        positions = (slot - cache.first).clamp(min=0).unsqueeze(1)
        logits.append(step.decode(tokens[:, slot - past, None], positions, cache).clone())
    return torch.stack(logits)


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_and_steps_are_the_model(name: str, kept: int) -> None:
    model = model_named(name, kept=kept)
    tokens = random_tokens(3, 18)
    true = own(model, tokens)  # [slots, batch, vocabulary]
    step, cache = built(model), cache_of(model, 3)
    with torch.inference_mode():
        assert distance(step.prompt(tokens[:, :9], cache), true[8]) < 1e-2
        assert distance(step.prompt(tokens[:, 9:14], cache, 9), true[13]) < 1e-2
    assert distance(decoded(step, cache, tokens[:, 14:], 14), true[14:]) < 1e-2


@pytest.mark.parametrize("at_once", [4096, 5])
@pytest.mark.parametrize("name", ["llama-3", "qwen3", "mistral"])
def test_rows_with_padding_are_rows_alone(name: str, at_once: int) -> None:
    """All at once, or a part after the other: two rows of a short prompt, some tokens of one row of a long one."""
    model = model_named(name)
    step, padding = built(model), (0, 7, 2, 12)
    step.rows = at_once  # type: ignore[misc]
    tokens, cache = random_tokens(4, 16), cache_of(model, 4, padding)
    with torch.inference_mode():
        first = step.prompt(tokens[:, :13], cache, padding=padding)
        second = step.prompt(tokens[:, 13:15], cache, 13, padding)
    third = decoded(step, cache, tokens[:, 15:], 15)[0]
    for row, begin in enumerate(padding):
        true = own(model, tokens[row : row + 1, begin:])[:, 0]
        for found, slot in ((first, 12), (second, 14), (third, 15)):
            assert distance(found[row], true[slot - begin]) < 1e-2


def test_a_prompt_with_others_behind_it() -> None:
    model = model_named("qwen2")
    step, cache, tokens = built(model), cache_of(model, 2), random_tokens(2, 16)
    true = own(model, tokens)
    cache.last.fill_(10)
    with torch.inference_mode():
        assert distance(step.prompt(tokens, cache, last=cache.last), true[10]) < 1e-2
    assert distance(decoded(step, cache, tokens[:, 11:], 11), true[11:]) < 1e-2  # over what the others left


def test_an_int8_head() -> None:
    model = model_named("qwen2")
    model.set_output_embeddings(Int8Head(model.lm_head.weight.detach()))
    tokens = random_tokens(2, 10)
    true = own(model, tokens)
    with torch.inference_mode():
        assert distance(built(model).prompt(tokens, cache_of(model, 2)), true[-1]) < 1e-2


def test_angles_that_depend_on_the_length() -> None:
    """Such a model's prompts are its own; where all positions are near, they are not."""
    model = quantized(model_of("llama", rope_parameters=ROPES["dynamic"], max_position_embeddings=64).half())
    step, cache = built(model), cache_of(model, 1)
    assert not step.takes(cache)
    assert step.ropes.steady(32)
    assert built(model_named("llama-3")).takes(cache)


@pytest.mark.parametrize("window", [None, 3, 40, 300])
@pytest.mark.parametrize("past", [0, 5, 290])
@pytest.mark.parametrize("padding", [(), (0, 0), (4, 0), (2, 297)])
def test_attention_of_a_prompt(past: int, window: int | None, padding: tuple[int, ...]) -> None:
    new, total = 10, past + 10
    if past == 290:
        new, total = 290, 300  # more than a block of a mask
    torch.manual_seed(0)
    query = torch.randn(2, new, 6, 8).transpose(1, 2)
    keys, values = torch.randn(2, 3, total + 2, 8)[:, :, :total], torch.randn(2, 3, total, 8)
    y = prompt_attention(query, keys, values, 0.3, window, tuple(min(each, total - 1) for each in padding))
    at = torch.arange(total)
    apart = at[-new:, None] - at
    seen = (apart >= 0) & (apart < (window or total))
    for row in range(2):
        first = min(padding[row], total - 1) if padding else 0
        mine = seen & (at >= first)
        some = slice(max(0, first - (total - new)), None)
        true = attend(query[row : row + 1], keys[row : row + 1], values[row : row + 1], 0.3, mine[None, None])
        torch.testing.assert_close(y[row, :, some], true[0].transpose(0, 1)[:, some])
        assert not bool(y[row, :, : some.start].any())


class Captured:
    """Steps and prompts as a GPU captures them, run as they are."""

    def __init__(self, model: Any) -> None:
        self.model, self.step = attach(model), built(model)
        self.prompts: list[tuple[int, ...]] = []
        prompt = self.step.prompt

        def counted(tokens: Tensor, *arguments: Any, **more: Any) -> Tensor:
            self.prompts.append(tuple(tokens.shape))
            return prompt(tokens, *arguments, **more)

        self.step.prompt = counted  # type: ignore[method-assign]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Captured]:
    monkeypatch.setattr(Probe, "cannot_capture", lambda self: None)

    def make(model: Any) -> Captured:
        found = Captured(model)
        monkeypatch.setattr("awq.engine.choose.BUILDERS", [lambda _: found.step])
        return found

    return make


SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def likely(model: Any, answer: Tensor, prompt: int) -> None:
    """Every token is one that the model itself could have chosen, up to ties."""
    logits = own(model, answer)[prompt - 1 : -1, 0].float()
    chosen = logits.gather(1, answer[0, prompt:, None]).squeeze(1)
    assert bool((chosen >= logits.amax(1) - 0.02 * logits.abs().amax()).all())


def test_generate_takes_it(captured: Callable[[Any], Captured]) -> None:
    found = captured(model_named("qwen3"))
    model = found.model
    assert [model.engine.tier_of(batch) for batch in (1, 9, 100)] == [2, 2, 2]
    assert str(model.engine) == "tier 2: fused step of many rows, static cache, CUDA graph"
    found.prompts.clear()
    tokens = random_tokens(1, 20)
    answer = model.generate(tokens, **SETTINGS, return_dict_in_generate=True)
    likely(model, answer.sequences, 20)
    longer = torch.cat([answer.sequences, random_tokens(1, 3)], 1)
    likely(model, model.generate(longer, past_key_values=answer.past_key_values, **SETTINGS), 29)
    assert found.prompts == [(1, 32), (1, 4)]
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, :5] = 0
    tokens = random_tokens(3, 20)
    answer = model.generate(tokens, attention_mask=mask, **SETTINGS)
    for row, first in enumerate((0, 5, 0)):
        likely(model, answer[row : row + 1, first:], 20 - first)
    assert found.prompts[2:] == [(3, 20)]
    mask[1] = torch.arange(20) % 7 != 3  # padding in the middle: the model's own forward, and steps
    model.generate(tokens, attention_mask=mask, **SETTINGS)
    assert len(found.prompts) == 3
    model.engine.limit(1)
    found.prompts.clear()
    model.generate(tokens, **SETTINGS)
    assert not found.prompts and model.engine.tier_of(3) == 1


def test_a_prompt_of_many_tokens_is_not_captured(captured: Callable[[Any], Captured]) -> None:
    found = captured(model_named("llama"))
    found.step.rows = 50  # type: ignore[misc]
    assert found.model.engine.tier == 2
    found.prompts.clear()
    found.model.generate(random_tokens(2, 20), **SETTINGS)
    found.model.generate(random_tokens(3, 20), **SETTINGS)
    assert found.prompts == [(2, 32), (3, 20)]


def test_wrong_prompts_are_left_to_the_model(captured: Callable[[Any], Captured]) -> None:
    found = captured(model_named("llama"))
    prompt = found.step.prompt

    def wrong(*arguments: Any, **more: Any) -> Tensor:
        return prompt(*arguments, **more) * 1.05

    found.step.prompt = wrong  # type: ignore[method-assign]
    assert "tier 2" in str(found.model.engine)
    assert "not fused prompts: its logits differ by 0.0" in str(found.model.engine)
    found.prompts.clear()
    found.model.generate(random_tokens(2, 20), **SETTINGS)
    assert not found.prompts


def test_texts_that_are_counted_as_usual() -> None:
    tokens, ones = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    counted = torch.arange(5).expand(2, -1)
    for mask in (None, ones):
        for positions in (None, counted, counted[:1], counted[None]):
            text = read_text(tokens, mask, positions, 0)
            assert text is not None and text.padding == () and text.mask is None
            assert text.positions.tolist() == [[5], [5]] and text.tokens.shape == (2, 5)
    padded = ones.clone()
    padded[1, :2] = 0
    text = read_text(tokens, padded, (padded.cumsum(1) - 1).clamp(min=0), 0)
    assert text is not None and text.padding == (0, 2) and text.mask is padded
    assert text.positions.tolist() == [[5], [3]]
    text = read_text(tokens, padded, (padded.cumsum(1) - 1).clamp(min=0), 3)  # three of them are in the cache
    assert text is not None and text.tokens.shape == (2, 2) and text.past == 3
    text = read_text(tokens[:, 3:], padded, (padded.cumsum(1) - 1).clamp(min=0), 3)  # or were not given
    assert text is not None and text.tokens.shape == (2, 2)
    text = read_text(tokens, None, None, 3)  # five more
    assert text is not None and text.tokens.shape == (2, 5) and text.positions.tolist() == [[8], [8]]
    assert read_text(tokens, padded, None, 0) is None
    assert read_text(tokens, padded, counted, 0) is None
    assert read_text(tokens, ones, counted + 1, 0) is None
    assert read_text(tokens, ones, counted, 5) is None
    assert read_text(tokens, ones[:, :4], counted, 0) is None
    assert read_text(tokens, ones[:, None, None], counted, 0) is None
    assert read_text(tokens, 0 * padded, counted, 0) is None
    ragged = ones.clone()
    ragged[0, 2] = 0
    assert read_text(tokens, ragged, (ragged.cumsum(1) - 1).clamp(min=0), 0) is None
