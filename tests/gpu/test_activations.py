"""Copies to the host and back beside what the GPU computes."""

import pytest
import torch
from torch import Tensor

from awq.algorithm.inputs import activations as activations_module
from awq.algorithm.inputs.activations import Activations, Parked, Room, ahead

pytestmark = pytest.mark.gpu
COUNT, SIZE = 40, 1 << 20


def parked(rooms: Activations) -> tuple[list[Parked], list[Tensor]]:
    """Tensors that the GPU is not yet done with when they are parked, and what they hold."""
    made, wanted = [], []
    for number in range(COUNT):
        matrix = torch.full((1024, 1024), number / 1024, device="cuda") @ torch.ones(1024, 1024, device="cuda")
        made.append(rooms.park(matrix))
        wanted.append(matrix.cpu())
        del matrix
    return made, wanted


@pytest.mark.parametrize("leaving", [0, 3 * 4 * SIZE, 1 << 40])
def test_they_come_back_as_they_were(leaving: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations_module, "LEAVING", leaving)
    rooms = Activations(Room(0), Room(1 << 40))
    for _ in range(2):  # the second time into the same host memory
        made, wanted = parked(rooms)
        found = []
        for value in ahead(made):
            busy = torch.ones(2048, 2048, device="cuda")
            for _ in range(5):
                busy = busy @ busy / 2048
            found.append(value + busy[0, 0] - 1)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, wanted, strict=True))
        assert len(made) == COUNT
        del made, found


def test_what_was_begun_and_is_forgotten_is_waited_for() -> None:
    rooms = Activations(Room(0), Room(1 << 40))
    one, zero = (rooms.park(torch.full((SIZE,), float(value), device="cuda")) for value in (1, 0))
    for _ in range(20):
        one.begin()
        one._coming = None  # what is allocated next has its memory
        fresh = torch.full((SIZE,), 2.0, device="cuda")
        assert float(fresh.sum()) == 2 * SIZE
        assert torch.equal(zero.get(), torch.zeros(SIZE, device="cuda"))


def test_memory_does_not_grow_with_what_the_host_is_ahead() -> None:
    rooms = Activations(Room(0), Room(1 << 40))
    made, _ = parked(rooms)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    total = torch.zeros(1024, 1024, device="cuda")
    for _ in range(5):
        for value in ahead(made):
            total += value @ value
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before < 20 * 4 * SIZE


def test_what_is_read_often_has_a_room_of_its_own() -> None:
    rooms = Activations(Room(0), Room(1 << 40), often=Room(4 * SIZE))
    first, second = (rooms.park(torch.ones(SIZE, device="cuda"), often=True) for _ in range(2))
    assert first._copies is None and second._copies is not None
    del first
    assert rooms.often.free == 4 * SIZE
