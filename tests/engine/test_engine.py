"""What an engine keeps, says and frees; and which architectures it takes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.engine import attach, engine_of
from awq.engine.cache import bucket_of
from awq.engine.choose import Probe, choose
from awq.engine.forward import ModelStep
from awq.engine.loop import Way
from awq.engine.memory import out_of_memory
from awq.engine.step import BUILDERS
from tests.architectures.families import FAMILIES, Family, tiny
from tests.engine.both import WAYS, engined
from tests.tiny import random_tokens, tiny_llama

SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_class()], ids=str)
def test_every_family_in_both_ways(family: Family) -> None:
    """The model's own forward with the cache gives its own logits; a family without a cache says so."""
    model = tiny(family)
    ways = choose(model)
    if not ways.ways:
        assert str(family) == "OpenAIGPT"
        assert ways.reason.startswith("a static cache: RuntimeError")
        return
    assert ways.reason == "the model's own forward, static cache, no CUDA graph (cpu has none)"
    probe = Probe(model, ways.windows)
    for captured in (False, True):
        assert probe.difference(Way(ways.ways[0].step, captured)) is None
    assert probe.padding_is_harmless()


@pytest.mark.parametrize("name", ["Mamba", "FalconH1"])
def test_other_states_are_left_to_transformers(name: str) -> None:
    import transformers

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "intermediate_size": 64, "state_size": 4}
    more = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **(more if name == "FalconH1" else {}), pad_token_id=0)
    model = attach(getattr(transformers, f"{name}ForCausalLM")(config).eval())
    assert model.engine.tier == 0
    assert "keeps a" in str(model.engine)
    tokens = model.generate(random_tokens(1, 6), **SETTINGS)
    assert tokens.shape[1] <= 18


class Wrong:
    """A step whose logits are off by a little more than rounding."""

    tier, how, max_batch = 2, "a wrong step", None

    def __init__(self, model: Any, factor: float, tier: int = 2) -> None:
        self.inner, self.factor, self.tier = ModelStep(model), factor, tier

    def decode(self, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        logits = self.inner.decode(tokens, positions, cache)
        return logits * self.factor


def test_a_step_is_compared_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "cannot_capture", lambda self: None)
    model = tiny_llama()
    monkeypatch.setattr("awq.engine.choose.BUILDERS", [lambda model: Wrong(model, 1.01), lambda model: "no such norm"])
    ways = choose(model)
    assert [way.step.tier for way in ways.ways] == [1]
    assert ways.refused["a wrong step"].startswith("its logits differ by 0.0")
    assert "no such norm" in ways.refused.values()
    monkeypatch.setattr("awq.engine.choose.BUILDERS", [lambda model: Wrong(model, 1.0)])
    ways = choose(model)
    assert [way.step.tier for way in ways.ways] == [2, 1]
    assert ways.way(1).step.tier == 2
    assert ways.way(1, ragged=True).step.tier == 1
    ways.ways[0].step.max_batch = 4
    assert ways.way(8).step.tier == 1
    assert isinstance(BUILDERS, list)


class WrongTogether(Wrong):
    """Right for one row."""

    max_batch = 8

    def decode(self, tokens: Tensor, positions: Tensor, cache: Any) -> Tensor:
        logits = self.inner.decode(tokens, positions, cache)
        return logits if len(tokens) == 1 else logits * self.factor


def test_one_row_and_several_are_compared_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "cannot_capture", lambda self: None)
    model = attach(tiny_llama())
    monkeypatch.setattr("awq.engine.choose.BUILDERS", [lambda model: WrongTogether(model, 1.0)])
    assert [model.engine.tier_of(batch) for batch in (1, 2, 8, 9)] == [2, 2, 2, 1]
    assert "a wrong step (up to 8 rows, more by the model's own forward), static" in str(model.engine)
    model.engine.reset()
    monkeypatch.setattr("awq.engine.choose.BUILDERS", [lambda model: WrongTogether(model, 1.01)])
    assert [model.engine.tier_of(batch) for batch in (1, 2, 8)] == [2, 1, 1]
    assert "a wrong step (1 row, more by the model's own forward), static" in str(model.engine)
    assert "not a wrong step of several rows: its logits differ by 0.0" in str(model.engine)


def test_a_step_that_cannot_be_captured_is_launched_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "cannot_capture", lambda self: None)

    def fail(*_arguments: Any) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr("awq.engine.graph.Graphs.run", fail)
    model = attach(tiny_llama())
    assert model.engine.tier == 1
    assert "no CUDA graph (RuntimeError: operation not permitted when stream is capturing)" in str(model.engine)
    assert "\n" not in str(model.engine)
    assert model.generate(random_tokens(1, 5), **SETTINGS).shape[1] == 17


@pytest.mark.parametrize("way", WAYS)
def test_everything_is_freed_with_the_model(way: str) -> None:
    model = engined(tiny_llama(), way)
    model.generate(random_tokens(1, 5), **SETTINGS)
    engine = model.engine
    watched = [weakref.ref(thing) for thing in (model, engine, engine._cache, engine._cache.parts[0].buffers[0])]
    gc.disable()
    del engine, model
    try:
        assert [one() for one in watched] == [None] * 4
    finally:
        gc.enable()


def test_the_cache_is_kept_and_its_bytes_stated() -> None:
    model = attach(tiny_llama())
    assert model.engine.nbytes == 0
    model.generate(random_tokens(1, 5), **SETTINGS)
    cache = model.engine._cache
    assert model.engine.nbytes == 256 * cache.slot_bytes == 256 * 2 * 2 * 2 * 16 * 4
    model.generate(random_tokens(1, 9), **SETTINGS)
    assert model.engine._cache is cache
    model.generate(random_tokens(3, 9), **SETTINGS)
    assert model.engine.nbytes == 3 * 256 * cache.slot_bytes
    model.engine.reset()
    assert model.engine.nbytes == 0


def test_two_models_side_by_side() -> None:
    first, second = attach(tiny_llama(0)), attach(tiny_llama(1))
    alone = [tiny_llama(seed).generate(random_tokens(1, 5), **SETTINGS) for seed in (0, 1)]
    for _ in range(2):
        for model, expected in zip((first, second), alone, strict=True):
            assert torch.equal(model.generate(random_tokens(1, 5), **SETTINGS), expected)
    assert first.engine is not second.engine
    assert type(first) is type(second)


@pytest.mark.parametrize("way", WAYS)
def test_after_an_error_the_next_query_is_right(way: str) -> None:
    model = engined(tiny_llama(), way)
    expected = model.generate(random_tokens(1, 5), **SETTINGS)

    class Broken:
        count = 0

        def put(self, value: Tensor) -> None:
            self.count += 1
            if self.count == 5:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        model.generate(random_tokens(1, 8), streamer=Broken(), **SETTINGS)
    assert torch.equal(model.generate(random_tokens(1, 5), **SETTINGS), expected)


@pytest.mark.parametrize("way", WAYS)
def test_threads_take_turns(way: str) -> None:
    model = engined(tiny_llama(), way)
    prompts = [random_tokens(1 + i % 2, 4 + i, seed=i) for i in range(6)]
    expected = [model.generate(prompt, **SETTINGS) for prompt in prompts]
    answers: dict[int, Tensor] = {}

    def ask(number: int) -> None:
        answers[number] = model.generate(prompts[number], **SETTINGS)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(answers[number], expected[number]) for number in range(len(prompts)))


def test_a_query_from_inside_of_another() -> None:
    model = attach(tiny_llama())
    expected, inner = model.generate(random_tokens(1, 5), **SETTINGS), []

    class Asking:
        def put(self, value: Tensor) -> None:
            if len(inner) < 2:
                inner.append(model.generate(random_tokens(1, 5), **SETTINGS))

        def end(self) -> None: ...

    assert torch.equal(model.generate(random_tokens(1, 5), streamer=Asking(), **SETTINGS), expected)
    assert all(torch.equal(answer, expected) for answer in inner)


def test_inference_mode_and_without() -> None:
    model = attach(tiny_llama())
    with torch.inference_mode():
        inside = model.generate(random_tokens(1, 5), **SETTINGS)
    assert torch.equal(model.generate(random_tokens(1, 5), **SETTINGS).add_(0), inside)


def test_another_dtype_is_tried_anew() -> None:
    model = attach(tiny_llama())
    before = model.engine.ways
    model.to(torch.bfloat16)
    model.generate(random_tokens(1, 5), **SETTINGS)
    assert model.engine.ways is not before
    assert model.engine._cache.parts[0].buffers[0].dtype == torch.bfloat16


def test_a_copy_of_the_model_has_its_own_engine() -> None:
    model = attach(tiny_llama())
    expected = model.generate(random_tokens(1, 5), **SETTINGS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        nn.init.zeros_(model.lm_head.weight)
    assert engine_of(other) is not engine_of(model)
    assert torch.equal(other.generate(random_tokens(1, 5), **SETTINGS), expected)


def test_a_model_keeps_its_name() -> None:
    plain, model = tiny_llama(), attach(tiny_llama())
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    assert attach(model) is model


@pytest.mark.parametrize(
    ("slots", "bucket"), [(1, 256), (256, 256), (257, 512), (1024, 1024), (1025, 1536), (1537, 2048), (5000, 6144)]
)
def test_buckets(slots: int, bucket: int) -> None:
    assert bucket_of(slots) == bucket


def test_out_of_memory_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(tiny_llama())
    model.engine.ways  # noqa: B018 - tried before memory runs out
    monkeypatch.setattr("awq.engine.memory.free_bytes", lambda device: 10_000_000)

    def exhausted(*_arguments: Any, **_more: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(model), "_prefill", exhausted)
    with pytest.raises(RuntimeError, match=r"the cache of 2 x 20 tokens takes 0.00 GB \(1 kB a token\)"):
        model.generate(random_tokens(2, 8), **SETTINGS)
    assert callable(out_of_memory)
