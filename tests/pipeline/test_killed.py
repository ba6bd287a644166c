"""SIGKILL at any moment: the same command goes on, solves no journaled block again, and ends in the same bytes."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from awq.checkpoint.output import unfinished
from awq.checkpoint.read import open_checkpoint
from awq.errors import AwqError
from tests.checkpoint.small import digests
from tests.pipeline.killed import Runner
from tests.tiny import save_tiny, tiny_llama

BLOCKS = 4
PLACES = [
    ("block", 1),
    ("block", 3),
    ("rounding", 4),
    ("after a block", 2),
    ("tensor", 1),
    ("tensor", 40),
    ("tensor", 77),
    ("outliers of a block", 2),
    ("journal", 1),
    ("journal", 3),
    ("journal line", 4),
    ("allocation", 3),
    ("outlier shard", 1),
    ("config", 1),
    ("index", 1),
    ("config", 2),
    ("rename", 1),
    ("after the rename", 1),
]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = tiny_llama(num_hidden_layers=BLOCKS, attention_bias=True)
    source = save_tiny(tmp_path_factory.mktemp("float"), model, torch.bfloat16)
    config = {"group_size": 32, "outlier_ratio": 0.03, "effort": "fast"}
    small = {"calibration": ["prose"], "samples": 4, "seq_len": 64, "shard_size": 30_000}
    return {"source": source, "config": config, "device": "cpu", "progress": False, **small}


@pytest.fixture(scope="module")
def whole(runner: Runner, request_of: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a run that nothing ended."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert runner.run(output=output, **request_of)["code"] == 0
    return digests(output)


def journaled(output: Path) -> set[int]:
    """The blocks that the journal has lines of."""
    try:
        lines = (unfinished(output) / "journal.jsonl").read_bytes().splitlines(keepends=True)[1:]
    except FileNotFoundError:
        return set()
    whole = [json.loads(line.partition(b" ")[2]) for line in lines if line.endswith(b"\n")]
    return {int(entry["block"].rpartition(".")[2]) for entry in whole}


def check(output: Path, runner: Runner, request_of: dict[str, Any], whole: dict[str, str]) -> None:
    """What a killed run has left is no checkpoint, or all of it, and the same command ends in it."""
    done, complete = journaled(output), output.exists()
    if complete:
        assert digests(output) == whole
    else:
        for folder in (unfinished(output), unfinished(output) / "checkpoint"):
            if not (folder / "config.json").exists():
                with pytest.raises(AwqError):
                    open_checkpoint(folder)
    again = runner.run(output=output, **request_of)
    assert again["code"] == 0, again["said"]
    assert done.isdisjoint(again["solved"])
    assert complete or done | set(again["solved"]) == set(range(BLOCKS))
    assert digests(output) == whole
    assert not unfinished(output).exists()


@pytest.mark.parametrize(("place", "count"), PLACES)
def test_killed_at_a_place(
    runner: Runner, request_of: dict[str, Any], whole: dict[str, str], tmp_path: Path, place: str, count: int
) -> None:
    ended = runner.run(output=tmp_path / "out", kill=(place, count), **request_of)
    assert ended["signal"] == signal.SIGKILL
    check(tmp_path / "out", runner, request_of, whole)


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_time_again_and_again(
    runner: Runner, request_of: dict[str, Any], whole: dict[str, str], tmp_path: Path, seed: int
) -> None:
    moments = random.Random(seed)
    for _ in range(3):
        runner.run(output=tmp_path / "out", kill=("time", moments.uniform(0.05, 1.2)), **request_of)
    check(tmp_path / "out", runner, request_of, whole)


def test_an_interrupt_is_one_sentence(
    runner: Runner, request_of: dict[str, Any], whole: dict[str, str], tmp_path: Path
) -> None:
    ended = runner.run(output=tmp_path / "out", kill=("interrupt", 3), **request_of)
    assert (ended["code"], ended["solved"]) == (2, [0, 1])
    assert ended["said"] == "2 of 4 blocks are kept: the same command goes on behind them."
    check(tmp_path / "out", runner, request_of, whole)
