"""Where activations wait changes nothing of the result; a block that does not fit is said at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from awq.algorithm.blocks import BlockLoop
from awq.algorithm.inputs.activations import Activations, ParkedList, Room
from awq.config import QuantConfig
from awq.errors import AwqError, ConfigError
from awq.pipeline import job, memory
from awq.pipeline.memory import Limits, Place, block_bytes, free_host
from awq.pipeline.recipe import quantize_folder
from tests.checkpoint.small import digests
from tests.efforts import every_effort
from tests.tiny import save_tiny, tiny_llama

CPU = torch.device("cpu")


def in_files(folder: Path) -> Activations:
    return Activations(Room(0), Room(0), Place(CPU, Limits(), folder).spill)


def run(source: Path, output: Path, effort: str, **more: Any) -> dict[str, str]:
    config = QuantConfig(group_size=32, outlier_ratio=0.03, effort=effort)
    small: dict[str, Any] = {"calibration": ["prose"], "samples": 40, "seq_len": 64, "device": "cpu"}
    return digests(quantize_folder(source, output, config, progress=False, **small | more).path)


@every_effort
@pytest.mark.parametrize("rooms", [(0, 0), (300_000, 0), (100_000, 400_000)])
def test_rooms_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, rooms: tuple[int, int]
) -> None:
    source = save_tiny(tmp_path / "float")
    expected = run(source, tmp_path / "whole", effort)
    made: list[Activations] = []

    def small(_blocks: Any, _config: Any, _tokens: Any, place: Place) -> Activations:
        made.append(Activations(Room(rooms[0]), Room(rooms[1]), place.spill))
        return made[-1]

    monkeypatch.setattr(job, "plan_activations", small)
    assert run(source, tmp_path / "small", effort) == expected
    assert made[0].spilled > 0


def test_room_is_given_back() -> None:
    activations = Activations(Room(1000), Room(1000))
    first, second = (activations.park(torch.full((200,), float(i))) for i in (1, 2))
    assert (activations.device.free, activations.host.free) == (200, 200)
    assert torch.equal(second.get(), torch.full((200,), 2.0))
    del first, second
    assert (activations.device.free, activations.host.free) == (1000, 1000)
    assert torch.equal(activations.park(torch.ones(300)).get(), torch.ones(300))


def test_what_waits_is_a_list_and_what_a_run_saw_a_dictionary() -> None:
    rooms = Activations(Room(0), Room(1 << 20))
    tensors = [torch.full((3,), float(number)) for number in range(4)]
    waiting = ParkedList([rooms.park(tensor) for tensor in tensors])
    assert all(map(torch.equal, waiting, tensors)) and torch.equal(waiting[-1], tensors[-1])
    with pytest.raises(IndexError):
        waiting[4]
    runs = rooms.list()
    for seen in ({"first": tensors[0], "both": tensors[1]}, {"both": tensors[2]}):
        runs.append(seen)
    found = list(runs)
    assert [sorted(seen) for seen in found] == [["both", "first"], ["both"]]
    assert torch.equal(found[0]["first"], tensors[0]) and torch.equal(found[1]["both"], tensors[2])
    assert found[1].get("first") is None


def test_files_of_activations_have_no_name(tmp_path: Path) -> None:
    activations = in_files(tmp_path)
    parked = activations.park(torch.arange(1000.0))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(parked.get(), torch.arange(1000.0)) and activations.spilled == 4000


def test_a_disk_without_room_for_activations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory.os, "posix_fallocate", full)
    with pytest.raises(AwqError, match=r"no room for activations .*No space left.*--host-memory"):
        in_files(tmp_path).park(torch.ones(10))


def test_a_block_that_does_not_fit_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tmp_path / "float")
    monkeypatch.setattr(BlockLoop, "__init__", lambda *_, **__: pytest.fail("too late"))
    needed = r"a block needs about 0\.0 GB of memory .* and 0\.0 GB may be used: .*--host-memory.*--effort fast"
    with pytest.raises(ConfigError, match=needed):
        run(source, tmp_path / "out", "balanced", host_memory="10KB")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize("size", ["much", "0GB", -1])
def test_sizes_that_are_none(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ConfigError, match=f"{size!r} is no size"):
        run(save_tiny(tmp_path / "float"), tmp_path / "out", "fast", gpu_memory=size)


def test_the_need_grows_with_the_effort_and_the_block() -> None:
    small, large = (tiny_llama(hidden_size=width, intermediate_size=2 * width).model.layers[0] for width in (64, 128))
    needs = [block_bytes(small, QuantConfig(effort=effort), torch.Size((128, 512))) for effort in ("fast", "balanced")]
    assert needs[0] < needs[1] < block_bytes(large, QuantConfig(), torch.Size((128, 512)))


def test_free_host_memory_is_some() -> None:
    assert 0 < free_host() <= 1 << 62
