"""`generate` through the engine gives what transformers gives, and leaves to it what it does not do."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from awq.engine import KVCache
from awq.engine.cache import PROMPTS
from awq.errors import ConfigError
from tests.engine.both import WAYS, engined
from tests.tiny import byte_tokenizer, random_tokens, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*")
both = pytest.mark.parametrize("way", WAYS)
END = 7


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model with the engine and without."""
    return engined(tiny_llama(), request.param), tiny_llama()


def padded(batch: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Prompts of unequal length, padded on the left."""
    tokens, mask = random_tokens(batch, length, seed=3), torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def alike(pair: tuple[Any, Any], inputs: Any = None, covered: bool = True, **settings: Any) -> Any:
    """The engine's answer, which must be transformers'."""
    inputs = {"input_ids": random_tokens(1, 9)} if inputs is None else inputs
    ours, theirs = (model.generate(**inputs, **{"max_new_tokens": 30, "pad_token_id": 0} | settings) for model in pair)
    assert (pair[0].engine.last == "") is covered, pair[0].engine.last
    assert torch.equal(ours, theirs)
    return ours


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 1},
        {"max_length": 20, "max_new_tokens": None},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 10},
        {"min_length": 25},
        {"eos_token_id": [END, 200]},
        {"eos_token_id": END, "min_new_tokens": 5, "repetition_penalty": 0.8},
        {"suppress_tokens": [1, 2, 250]},
        {"num_return_sequences": 1, "use_cache": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_those_of_transformers(pair: Any, settings: dict[str, Any], batch: int) -> None:
    inputs = padded(batch) if batch > 1 else None
    alike(pair, inputs, do_sample=False, **settings)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 250, 256, 257, 300])
def test_every_length_of_a_prompt(pair: Any, length: int) -> None:
    """Across the lengths that graphs are recorded for, and across the growth of the cache."""
    alike(pair, {"input_ids": random_tokens(1, length)}, do_sample=False, max_new_tokens=20)


def test_a_prompt_longer_than_any_that_is_captured(pair: Any) -> None:
    alike(pair, {"input_ids": random_tokens(1, PROMPTS[-1] - 20)}, do_sample=False, max_new_tokens=5)


def test_the_cache_grows_on_the_way(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.engine.engine._FIRST_TOKENS", 8)
    alike(pair, padded(2), do_sample=False, max_new_tokens=600, eos_token_id=None)


def test_batches_and_lengths_change_from_call_to_call(pair: Any) -> None:
    for batch, length in ((4, 5), (1, 40), (2, 9), (4, 5), (8, 3)):
        alike(pair, {"input_ids": random_tokens(batch, length, seed=batch)}, do_sample=False, max_new_tokens=12)


def test_a_sequence_that_ends_is_padded_while_others_go_on(pair: Any) -> None:
    free = alike(pair, padded(), do_sample=False, eos_token_id=None)
    end = int(free[1, 12 + 4])  # what the second row says as its fifth word
    tokens = alike(pair, padded(), do_sample=False, eos_token_id=end, pad_token_id=299)
    assert (tokens[1, 12 + 5 :] == 299).all()


def test_prompts_that_transformers_pads_by_itself(pair: Any) -> None:
    tokens = padded()["input_ids"]
    alike(pair, {"input_ids": tokens}, do_sample=False, pad_token_id=0, eos_token_id=5)


def test_padding_that_is_not_on_the_left(pair: Any) -> None:
    inputs = padded(2)
    inputs["attention_mask"][1] = 1
    inputs["attention_mask"][1, 4:6] = 0
    alike(pair, inputs, do_sample=False)
    assert not torch.equal(inputs["attention_mask"], padded(2)["attention_mask"])


def test_no_prompt_at_all(pair: Any) -> None:
    alike(pair, {}, do_sample=False)


def test_a_whole_configuration(pair: Any) -> None:
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, repetition_penalty=1.2, pad_token_id=0)
    ours, theirs = (model.generate(random_tokens(1, 9), generation_config=settings) for model in pair)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stop", ["stop", ["e", "xyz"], "qu"])
def test_stop_strings(pair: Any, stop: Any) -> None:
    tokenizer = byte_tokenizer()
    free = alike(pair, do_sample=False, eos_token_id=None, max_new_tokens=60)
    letter = next(text for token in free[0, 20:] if (text := tokenizer.decode(token)).isascii() and text.isprintable())
    settings = {"tokenizer": tokenizer, "do_sample": False, "eos_token_id": None, "max_new_tokens": 60}
    assert alike(pair, stop_strings=[letter, "never"], **settings).shape[1] < free.shape[1]
    alike(pair, padded(2), do_sample=False, stop_strings=stop, tokenizer=tokenizer, max_new_tokens=60)


class Longer(StoppingCriteria):
    """Stops rows at different lengths."""

    def __call__(self, input_ids: Tensor, scores: Any, **_more: Any) -> Tensor:
        long = [input_ids.shape[1] > 14 + 3 * row for row in range(len(input_ids))]
        return torch.tensor(long, device=input_ids.device)


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": 5, "pad_token_id": 3}])
def test_criteria_of_the_caller(pair: Any, settings: dict[str, Any]) -> None:
    alike(pair, padded(), do_sample=False, stopping_criteria=StoppingCriteriaList([Longer()]), **settings)


def test_a_limit_of_time(pair: Any) -> None:
    tokens = pair[0].generate(random_tokens(1, 4), max_time=0.0, max_new_tokens=50, pad_token_id=0)
    assert tokens.shape[1] == 5


class Recorder:
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("batch", [1, 2])
def test_a_streamer_gets_what_it_gets_from_transformers(pair: Any, batch: int) -> None:
    ours, theirs = Recorder(), Recorder()
    for model, streamer in zip(pair, (ours, theirs), strict=True):
        model.generate(**padded(batch), streamer=streamer, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert ours.values == theirs.values
    assert ours.ended


def test_text_streamers(pair: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, prompt = byte_tokenizer(), random_tokens(1, 6)
    for model in pair:
        model.generate(prompt, streamer=TextStreamer(tokenizer), do_sample=False, max_new_tokens=20, pad_token_id=0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    texts = []
    for model in pair:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        settings = {"streamer": streamer, "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
        thread = threading.Thread(target=model.generate, args=(prompt,), kwargs=settings)
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    assert texts[0] == texts[1] != ""


class Upwards(LogitsProcessor):
    def __repr__(self) -> str:
        return "Upwards()"  # a test's name is the same in every process

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.arange(scores.shape[-1], device=scores.device) / 100


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, None),
        ({"logits_processor": LogitsProcessorList([Upwards()])}, "the logits processor Upwards"),
        ({"no_repeat_ngram_size": 2}, "the logits processor NoRepeatNGramLogitsProcessor"),
        ({"bad_words_ids": [[4], [9, 3]]}, "the logits processor NoBadWordsLogitsProcessor"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, None),
        ({"past_key_values": "dynamic"}, "a DynamicCache of the caller's"),
        ({"cache_implementation": "static"}, "a StaticCache of the caller's"),
    ],
    ids=str,
)
def test_what_is_left_to_transformers(pair: Any, settings: dict[str, Any], reason: str | None) -> None:
    answers = []
    for model in pair:
        given = settings | ({"past_key_values": DynamicCache()} if "past_key_values" in settings else {})
        answers.append(model.generate(random_tokens(1, 9), do_sample=False, max_new_tokens=12, pad_token_id=0, **given))
    assert torch.equal(*answers)
    assert reason is None or pair[0].engine.last == reason


def test_scores_are_left_to_transformers(pair: Any) -> None:
    ours, theirs = (
        model.generate(
            random_tokens(1, 9), do_sample=False, max_new_tokens=4, output_scores=True, return_dict_in_generate=True
        )
        for model in pair
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, theirs.scores, strict=True))


def test_a_conversation_goes_on_with_its_cache(pair: Any) -> None:
    settings = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
    for batch in (1, 2):
        whole, cache = padded(batch), None
        reference = dict(whole)
        for turn in range(3):
            ours = pair[0].generate(**whole, past_key_values=cache, return_dict_in_generate=True, **settings)
            theirs = pair[1].generate(**reference, **settings)
            assert pair[0].engine.last == ""
            assert torch.equal(ours.sequences, theirs)
            cache = ours.past_key_values
            assert isinstance(cache, KVCache)
            assert cache.get_seq_length() == ours.sequences.shape[1] - 1
            tokens = torch.cat([ours.sequences, random_tokens(batch, 5, seed=turn)], dim=1)
            more = tokens.shape[1] - whole["attention_mask"].shape[1]
            mask = torch.nn.functional.pad(whole["attention_mask"], (0, more), value=1)
            whole = reference = {"input_ids": tokens, "attention_mask": mask}


def test_a_cache_that_was_handed_out_serves_a_plain_forward(pair: Any) -> None:
    given = pair[0].generate(random_tokens(1, 9), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache, tokens = given.past_key_values, given.sequences
    with torch.no_grad():
        some = pair[0](tokens[:, -1:], past_key_values=cache).logits
        assert torch.allclose(some[:, -1], pair[1](tokens).logits[:, -1], atol=1e-4)
        cache.crop(-3)
        again = pair[0](tokens[:, -3:], past_key_values=cache).logits
    assert torch.allclose(again[:, -1], some[:, -1], atol=1e-4)
    assert not torch.equal(pair[0].generate(random_tokens(1, 9, seed=5), max_new_tokens=4, do_sample=False), tokens)
    assert cache.get_seq_length() == tokens.shape[1]


def test_several_sequences_of_one_prompt(pair: Any) -> None:
    torch.manual_seed(0)
    tokens = pair[0].generate(
        random_tokens(2, 5), num_return_sequences=3, do_sample=True, max_new_tokens=8, pad_token_id=0, temperature=3.0
    )
    assert tokens.shape == (6, 13)
    assert len({tuple(row.tolist()) for row in tokens[:3]}) == 3


@both
@pytest.mark.parametrize("window", [5, 300])
def test_sliding_windows(way: str, window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window}
        made = MistralForCausalLM(MistralConfig(**sizes, **heads, bos_token_id=0, eos_token_id=None)).eval()
        for parameter in made.parameters():
            parameter.data.mul_(4)
        return made

    both = engined(model(), way), model()
    alike(both, padded(), do_sample=False, max_new_tokens=40)
    alike(both, {"input_ids": random_tokens(1, 310)}, do_sample=False, max_new_tokens=20)


def test_more_than_the_longest_allowed_is_an_error_before_any_work(pair: Any) -> None:
    pair[0].engine.max_seq_len = 64
    with pytest.raises(ConfigError, match="60 tokens and 5 new ones exceed max_seq_len=64"):
        pair[0].generate(random_tokens(1, 60), max_new_tokens=5)
    pair[0].engine.max_seq_len = None
