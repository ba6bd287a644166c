"""The remembered crossover: a file that may be damaged, shared, or not writable."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awq.errors import ConfigError
from awq.kernels.base import GEMV_ROWS
from awq.kernels.cuda import crossover

CPU = torch.device("cpu")
SLOPED, FLAT = [1, 2, 3, 4, 5, 6, 7, 8], [4.5] * 8


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AWQ_CROSSOVER", raising=False)
    forget()
    yield tmp_path / "cache" / "crossover"
    forget()


def forget() -> None:
    """As a new process does."""
    crossover._known.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each measurement, of which GEMV wins up to 4 rows."""
    calls: list[str] = []

    def measure(run: Any, device: torch.device) -> tuple[list[float], list[float]]:
        calls.append("measured")
        return [float(each) for each in SLOPED], FLAT

    monkeypatch.setattr(crossover, "_measure", measure)
    return calls


def find(key: str = "a GPU, 64x64") -> int:
    return crossover.find(key, lambda version, rows: None, CPU)


@pytest.mark.parametrize(
    ("gemv", "gemm", "rows"),
    [
        (SLOPED, FLAT, 4),
        (SLOPED, [0.5] * 8, 1),  # one row is GEMV's in any case
        (SLOPED, [9.0] * 8, 8),
        ([1, 5, 1, 1, 1, 9, 9, 9], [4] * 8, 5),  # one slow measurement among fast ones
        ([1, 9, 9, 9, 1, 9, 9, 9], [4] * 8, 1),
        (FLAT, FLAT, 1),
    ],
)
def test_the_limit_that_costs_least(gemv: list[float], gemm: list[float], rows: int) -> None:
    assert crossover.best_limit(gemv, gemm) == rows


def test_measured_once_and_remembered(cache: Path, measured: list[str]) -> None:
    assert crossover.recall("a GPU, 64x64") is None
    assert [find() for _ in range(3)] == [4] * 3
    forget()
    assert find() == crossover.recall("a GPU, 64x64") == 4
    assert measured == ["measured"]
    assert json.loads((cache / "rows.json").read_text()) == {"a GPU, 64x64": 4}
    assert [file.name for file in cache.iterdir()] == ["rows.json"]


def test_each_key_on_its_own(measured: list[str]) -> None:
    find("one"), find("two"), find("one")
    assert len(measured) == 2


def test_what_another_process_wrote_meanwhile_is_kept(cache: Path, measured: list[str]) -> None:
    find("one")
    (cache / "rows.json").write_text('{"of another process": 7, "one": 4}')
    find("two")
    assert json.loads((cache / "rows.json").read_text()) == {"of another process": 7, "one": 4, "two": 4}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "null",
        "7",
        '{"a GPU, 64x64": "4"}',
        '{"a GPU, 64x64": true}',
        '{"a GPU, 64x64": 99}',
        "\0",
        "\udcff",
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(cache: Path, measured: list[str], text: str) -> None:
    cache.mkdir(parents=True)
    (cache / "rows.json").write_bytes(text.encode(errors="surrogateescape"))
    assert find() == 4
    assert json.loads((cache / "rows.json").read_text()) == {"a GPU, 64x64": 4}


def test_a_folder_that_cannot_be_written(
    cache: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with caplog.at_level(logging.WARNING, "awq"):
        assert [find(), find(), find("another")] == [4, 4, 4]
    assert len(measured) == 2
    (record,) = caplog.records
    assert "measured at every start" in record.message and "Permission denied" in record.message


def test_short_of_memory_nothing_is_remembered(
    cache: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(crossover, "_measure", fail)
        assert find() == GEMV_ROWS and not any(cache.iterdir())
    assert find() == 4


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.record = list

    def elapsed_time(self, end: Any) -> float:
        return 1.0


@pytest.mark.parametrize("cache_bytes", [4 << 20, 60 << 20, 300 << 20])
def test_the_gpu_is_busy_while_the_cpu_enqueues(monkeypatch: pytest.MonkeyPatch, cache_bytes: int) -> None:
    """Memory for it is found before anything is compiled; 400 MB take a GPU of 8 TB/s 50 us to write."""
    done: list[str] = []

    class Memory:
        def __init__(self, size: int, **where: Any) -> None:
            assert size >= 2 * cache_bytes
            self.size = size

        def zero_(self) -> None:
            done.append("z" * (self.size // 1_000_000))

    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache_bytes))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda size, **where: done.append("made") or Memory(size))
    crossover._measure(lambda version, rows: done.append(version), CPU)
    assert done[0] == "made" and done.count("made") == 1
    written = "".join("." if text in ("GEMV", "GEMM") else text for text in done[1:]).lstrip(".").split(".")
    assert len(written) == 5 * 16 + 1 and min(map(len, written[:-1])) >= 395


def test_without_a_folder(cache: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file where the folder would be")
    assert [find(), find()] == [4, 4]
    assert measured == ["measured"]


def test_nothing_is_left_of_a_write_that_fails(
    cache: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert find() == 4
    assert not any(cache.iterdir())


def test_set_by_hand(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("0", "6"):
        monkeypatch.setenv("AWQ_CROSSOVER", text)
        assert crossover.recall("any") == find() == int(text)
    monkeypatch.setenv("AWQ_CROSSOVER", "GEMV")
    with pytest.raises(ConfigError, match="AWQ_CROSSOVER='GEMV' is no number of rows"):
        find()
    assert not measured
