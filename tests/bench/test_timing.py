import pytest
import torch

from awq.bench.timing import Replay, Timing, measure, percentile, record, time_in_turn

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([5.0], 90, 5.0), ([1.0, 3.0], 50, 2.0), ([4.0, 1.0, 3.0, 2.0], 0, 1.0), ([4.0, 1.0, 3.0, 2.0], 100, 4.0)],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_percentile_interpolates() -> None:
    assert percentile([float(value) for value in range(11)], 25) == 2.5


def test_timing_of_samples() -> None:
    timing = Timing.of([3.0, 1.0, 2.0])
    assert timing.median == 2.0
    assert timing.p10 < timing.median < timing.p90
    assert timing.repeats == 3


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 5), (1e9, 20)])
def test_repeats_stay_in_their_limits(seconds: float, expected: int) -> None:
    calls = []
    timing = measure(lambda: calls.append(0), CPU, seconds=seconds, repeats=(5, 20))
    assert timing.repeats == expected
    assert len(calls) == expected + 2  # warm-up
    assert 0 <= timing.p10 <= timing.median <= timing.p90


def test_a_recorded_series_counts_its_calls() -> None:
    calls: list[int] = []
    replay = record(calls.append, 3, CPU)
    assert calls == []
    replay.run()
    replay.run()
    assert (replay.calls, calls) == (3, [0, 1, 2, 0, 1, 2])


def test_series_are_timed_in_turn() -> None:
    order: list[str] = []
    replays = {name: Replay(lambda name=name: order.append(name), 10) for name in "abc"}  # type: ignore[misc]
    timings = time_in_turn(replays, CPU, blocks=2, samples=3, pause=0)
    assert "".join(order) == "aaaabbbbccccbbbbccccaaaa"  # each warmed up by one more
    assert list(timings) == ["a", "b", "c"]
    assert {timing.repeats for timing in timings.values()} == {6}


def test_a_series_costs_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.bench.timing.wall_seconds", lambda call, count: [0.5] * count)
    assert time_in_turn({"a": Replay(lambda: None, 10)}, CPU, pause=0)["a"].median == 0.05


@pytest.mark.gpu
def test_a_graph_does_what_was_recorded() -> None:
    device = torch.device("cuda", 0)
    total = torch.zeros(1, device=device)
    replay = record(total.add_, 5, device)
    timing = time_in_turn({"sum": replay}, device, blocks=2, samples=3)["sum"]
    assert total.item() == 10 * 2 * 4
    assert timing.median > 0


@pytest.mark.gpu
def test_events_time_the_gpu() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(512, 512, device=device)
    timing = measure(lambda: x @ x, device, seconds=0.01)
    assert 0 < timing.p10 <= timing.median <= timing.p90
