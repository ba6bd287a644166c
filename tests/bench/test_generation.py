import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.bench.generation import Clock, measure_generation, process_peak, weight_bytes
from tests.tiny import tiny_llama


class Recorder:
    def __init__(self) -> None:
        self.put_values: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.put_values.append(value)

    def end(self) -> None:
        self.ended = True


def test_clock_notes_new_tokens_and_hands_all_on() -> None:
    inner = Recorder()
    clock = Clock(inner, start=0.0)
    for value in ([1, 2, 3], [4], [5], [6]):
        clock.put(torch.tensor(value))
    clock.end()
    assert len(inner.put_values) == 4
    assert inner.ended
    assert clock.arrivals == sorted(clock.arrivals)
    assert clock.first == clock.arrivals[0] > 0
    assert len(clock.steps) == 2
    assert clock.tokens_per_second is not None


def test_clock_has_no_speed_after_one_token() -> None:
    clock = Clock()
    clock.put(torch.tensor([1, 2]))
    clock.put(torch.tensor([3]))
    assert clock.tokens_per_second is None


def test_latency_of_a_model() -> None:
    latency = measure_generation(tiny_llama(), "float", prompt_tokens=7, new_tokens=5, repeats=2)
    assert (latency.label, latency.prompt_tokens, latency.new_tokens, latency.repeats) == ("float", 7, 5, 2)
    assert 0 < latency.token_ms_p50 <= latency.token_ms_p90 <= latency.token_ms_p99
    assert latency.ttft_ms > 0
    assert latency.tokens_per_second > 0
    assert latency.peak_of == "this process so far"
    assert latency.peak_bytes is not None
    assert latency.weight_bytes < latency.peak_bytes <= (process_peak() or 0)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_of_the_process_in_bytes(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3000))
    monkeypatch.setitem(sys.modules, "resource", usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert process_peak() == 3000 * unit
    monkeypatch.setitem(sys.modules, "resource", None)
    assert process_peak() is None


@pytest.mark.parametrize("end", [0, 255])
def test_an_end_of_sequence_does_not_shorten_a_query(end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every query has the same number of tokens, whatever the model would rather say."""
    model: Any = tiny_llama()
    model.generation_config.eos_token_id = end
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely: greedy takes the first
    lengths = []
    generate = model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **kwargs)
        lengths.append(output.shape[1])
        return output

    monkeypatch.setattr(model, "generate", spy)
    measure_generation(model, "float", prompt_tokens=3, new_tokens=6, repeats=2)
    assert lengths[1:] == [9, 9]


def test_tied_weights_count_once() -> None:
    tied, untied = tiny_llama(tie_word_embeddings=True), tiny_llama(tie_word_embeddings=False)
    embedding = tied.get_input_embeddings().weight
    assert weight_bytes(untied) - weight_bytes(tied) == embedding.nbytes
