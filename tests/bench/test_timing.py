import pytest
import torch

from awq.bench.timing import Timing, measure, percentile

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


@pytest.mark.gpu
def test_events_time_the_gpu() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(512, 512, device=device)
    timing = measure(lambda: x @ x, device, seconds=0.01)
    assert 0 < timing.p10 <= timing.median <= timing.p90
