"""A run that ends before its time: the same command does what is left to do, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from awq.algorithm.blocks import BlockLoop
from awq.checkpoint import slots
from awq.checkpoint.output import unfinished
from awq.checkpoint.read import open_checkpoint
from awq.checkpoint.slots import Slots
from awq.config import QuantConfig
from awq.errors import AwqError, CheckpointError, OutOfMemoryError, OutputExistsError
from awq.pipeline import recipe as recipe_module
from awq.pipeline.recipe import Finished, quantize_folder
from awq.pretrained import source as source_module
from tests.checkpoint.small import digests
from tests.efforts import every_effort
from tests.tiny import save_tiny, tiny_llama

CONFIG = QuantConfig(group_size=32, outlier_ratio=0.03, effort="fast")
BLOCKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, which are stored less exactly than they are propagated, and a float linear that is scaled."""
    folder = tmp_path_factory.mktemp("float")
    return save_tiny(folder, tiny_llama(num_hidden_layers=BLOCKS, attention_bias=True), torch.bfloat16)


def run(source: Path, output: Path, config: QuantConfig = CONFIG, **changes: Any) -> Finished:
    arguments: dict[str, Any] = {"calibration": ["prose"], "samples": 4, "seq_len": 64, "device": "cpu"}
    return quantize_folder(source, output, config, **arguments | {"progress": False, "shard_size": 30_000} | changes)


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that are solved, in order."""
    seen: list[int] = []
    solve = BlockLoop._solve

    def noting(self: BlockLoop, block: Any, index: int, stored_in: torch.dtype) -> Any:
        seen.append(index)
        return solve(self, block, index, stored_in)

    monkeypatch.setattr(BlockLoop, "_solve", noting)
    return seen


def end_at(monkeypatch: pytest.MonkeyPatch, block: int, error: BaseException) -> None:
    """The next run ends while it solves `block`."""
    solve = BlockLoop._solve

    def ending(self: BlockLoop, module: Any, index: int, stored_in: torch.dtype) -> Any:
        if index == block:
            monkeypatch.setattr(BlockLoop, "_solve", solve)
            raise error
        return solve(self, module, index, stored_in)

    monkeypatch.setattr(BlockLoop, "_solve", ending)


def interrupted(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, block: int = 2, **changes: Any) -> Path:
    """The work of a run that was interrupted while it solved `block`."""
    end_at(monkeypatch, block, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(source, output, **changes)
    return unfinished(output)


@every_effort
@pytest.mark.parametrize("kept", ["", "v_proj"])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int], effort: str, kept: str
) -> None:
    config = replace(CONFIG, effort=effort, modules_to_not_convert=(kept,) if kept else ())
    whole = run(source, tmp_path / "whole", config)
    assert solved == [0, 1, 2, 3]
    for block in (1, 3):
        interrupted(source, tmp_path / "parts", monkeypatch, block, config=config)
    assert not (tmp_path / "parts").exists()
    finished = run(source, tmp_path / "parts", config)
    assert solved[BLOCKS:] == [0, 1, 2, 3]  # each of them once, in three runs
    assert digests(finished.path) == digests(whole.path)
    assert finished.report == whole.report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_in_memory_and_from_disk_it_is_the_same_checkpoint(source: Path, tmp_path: Path) -> None:
    whole = run(source, tmp_path / "whole", whole=True)
    assert digests(whole.path) == digests(run(source, tmp_path / "parts").path)


def test_an_interrupt_says_what_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_at(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match="2 of 4 blocks are kept: the same command goes on behind them"):
        run(source, tmp_path / "out")


def test_an_end_before_the_first_block_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not interrupted(source, tmp_path / "out", monkeypatch, 0).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": replace(CONFIG, group_size=64)}, r"recipe\.config\.group_size \(32, now 64\)"),
        ({"config": replace(CONFIG, effort="balanced")}, r"recipe\.config\.effort \(fast, now balanced\)"),
        ({"seed": 1}, "the calibration text"),
        ({"samples": 3}, r"recipe\.calibration\.shape"),
        ({"shard_size": "1GB"}, r"shard_bytes \(30000, now 1000000000\)"),
        ({"source": "other"}, "the model's files"),
    ],
)
def test_what_has_changed_is_named_and_not_mixed_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    work = interrupted(source, tmp_path / "out", monkeypatch)
    before = digests(work)
    if "source" in changes:
        other = tiny_llama(seed=1, num_hidden_layers=BLOCKS, attention_bias=True)
        changes = {"source": save_tiny(tmp_path / "other" / source.name, other, torch.bfloat16)}
    arguments: dict[str, Any] = {"source": source, "output": tmp_path / "out", **changes}
    with pytest.raises(OutputExistsError, match=f"differs in .*{sentence}.*--overwrite"):
        run(**arguments)
    assert digests(work) == before
    run(**arguments, overwrite=True)
    assert not work.exists()
    assert digests(tmp_path / "out") == digests(run(**arguments | {"output": tmp_path / "anew"}).path)


def test_another_library_refuses_to_go_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(source, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(recipe_module.transformers, "__version__", "5.99")
    with pytest.raises(OutputExistsError, match=r"versions\.transformers \(.*, now 5\.99\)"):
        run(source, tmp_path / "out")


def test_overwriting_goes_on_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int]
) -> None:
    old = run(source, tmp_path / "out", replace(CONFIG, group_size=64))
    before = digests(old.path)
    interrupted(source, tmp_path / "out", monkeypatch, overwrite=True)
    assert digests(old.path) == before
    del solved[:]
    run(source, tmp_path / "out", overwrite=True)
    assert solved == [2, 3]
    assert open_checkpoint(tmp_path / "out").quant.group_size == 32


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def no_end(path: Path) -> None:
    """A line that was being written when the power went."""
    path.write_bytes(path.read_bytes() + b'0123 {"block": "model.lay')


DAMAGE: list[tuple[str, str, Callable[[Path], object], list[int]]] = [
    ("journal: last line", "journal.jsonl", cut, [2, 3]),
    ("journal: torn line", "journal.jsonl", no_end, [3]),
    ("journal: first line", "journal.jsonl", lambda path: flip(path, 40), [0, 1, 2, 3]),
    ("journal: not text", "journal.jsonl", lambda path: path.write_bytes(b"\xff\n" * 9), [0, 1, 2, 3]),
    ("journal: gone", "journal.jsonl", lambda path: path.unlink(), [0, 1, 2, 3]),
    ("first shard: a bit of the second block", "checkpoint/model-00001-of-*", flip, [1, 2, 3]),
    ("last shard: a bit, not written yet", "checkpoint/model-00006-of-*", flip, [3]),
    ("second shard: cut", "checkpoint/model-00002-of-*", cut, [1, 2, 3]),
    ("first shard: gone", "checkpoint/model-00001-of-*", lambda path: path.unlink(), [0, 1, 2, 3]),
    ("outliers of a block: a bit", "parts/block-00001.safetensors", flip, [1, 2, 3]),
    ("outliers of a block: gone", "parts/block-00002.safetensors", lambda path: path.unlink(), [2, 3]),
    ("header of a shard", "checkpoint/model-00001-of-*", lambda path: flip(path, 3), [3]),
]


@pytest.mark.filterwarnings("ignore:.*is damaged behind")
@pytest.mark.parametrize(("name", "damage", "again"), [row[1:] for row in DAMAGE], ids=[row[0] for row in DAMAGE])
def test_damaged_leftovers_are_found_and_made_anew(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    solved: list[int],
    name: str,
    damage: Callable[[Path], object],
    again: list[int],
) -> None:
    whole = run(source, tmp_path / "whole")
    work = interrupted(source, tmp_path / "out", monkeypatch, 3)
    (path,) = work.glob(name)
    damage(path)
    del solved[:]
    finished = run(source, tmp_path / "out")
    assert solved == again
    assert digests(finished.path) == digests(whole.path)


def test_damage_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = interrupted(source, tmp_path / "out", monkeypatch, 3)
    flip(work / "parts" / "block-00001.safetensors")
    with pytest.warns(UserWarning, match="is damaged behind 1 finished blocks: it goes on from there"):
        run(source, tmp_path / "out")


def test_two_runs_at_once_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = BlockLoop._solve
    found: list[str] = []

    def another(self: BlockLoop, *arguments: Any) -> Any:
        monkeypatch.setattr(BlockLoop, "_solve", solve)
        with pytest.raises(AwqError, match="is being written by another run") as error:
            run(source, tmp_path / "out")
        found.append(str(error.value))
        return solve(self, *arguments)

    monkeypatch.setattr(BlockLoop, "_solve", another)
    run(source, tmp_path / "out")
    assert found


@pytest.mark.parametrize("position", range(0, 40, 4))
def test_a_full_disk_keeps_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int], position: int
) -> None:
    """At any write, of a tensor or of the journal."""
    whole = run(source, tmp_path / "whole")
    sync, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > position:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AwqError, match=r"could not be written \(.*No space left on device.*free some space"):
        run(source, tmp_path / "out")
    monkeypatch.setattr(os, "fsync", sync)
    assert not (tmp_path / "out").exists()
    kept = set(solved[BLOCKS:])
    assert digests(run(source, tmp_path / "out").path) == digests(whole.path)
    assert len(solved) <= 2 * BLOCKS + 2 and len(kept) <= BLOCKS


def test_a_disk_without_room_is_noticed_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int]
) -> None:
    monkeypatch.setattr(Slots, "missing_bytes", 10**18)
    with pytest.raises(AwqError, match=r"needs 1000000000\.00 GB and .* free: make room"):
        run(source, tmp_path / "out")
    assert not solved and list(tmp_path.iterdir()) == []


def test_room_that_is_taken_meanwhile(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int, _size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slots, "_reserve", full)
    with pytest.raises(AwqError, match=r"could not be written .*No space left"):
        run(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_source(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Any, name: str) -> Any:
        raise CheckpointError(f"{name} cannot be read (Input/output error): copy the file again.")

    work = interrupted(source, tmp_path / "out", monkeypatch, 2)
    with monkeypatch.context() as patch:
        patch.setattr(source_module.TensorFiles, "load", unreadable)
        with pytest.raises(CheckpointError, match=r"copy the file again\. 2 of 4 blocks are kept"):
            run(source, tmp_path / "out")
    assert work.exists()
    run(source, tmp_path / "out")


def test_a_source_that_was_cut(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = save_tiny(tmp_path / "float", tiny_llama(num_hidden_layers=BLOCKS))
    work = interrupted(copied, tmp_path / "out", monkeypatch, 2)
    cut(copied / "model.safetensors")
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        run(copied, tmp_path / "out")
    assert work.exists()


def test_nothing_unfinished_passes_for_a_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = interrupted(source, tmp_path / "out", monkeypatch, 3)
    for folder in (work, work / "checkpoint"):
        with pytest.raises(AwqError):
            open_checkpoint(folder)
    assert (
        json.loads((work / "journal.jsonl").read_text().splitlines()[1].partition(" ")[2])["block"] == "model.layers.0"
    )


@pytest.mark.parametrize("block", [0, 2])
def test_a_gpu_without_memory_says_what_helps_and_what_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    end_at(monkeypatch, block, torch.OutOfMemoryError("CUDA out of memory"))
    kept = "2 of 4 blocks are kept: the same command goes on behind them" if block else "which needs less"
    with pytest.raises(OutOfMemoryError, match=rf"lower --gpu-memory.*{kept}\.$"):
        run(source, tmp_path / "out")
    assert run(source, tmp_path / "out").path == tmp_path / "out"
