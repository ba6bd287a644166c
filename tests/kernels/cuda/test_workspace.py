"""Places for split tiles: one a stream, apart from pools of graphs, and none kept of a capture."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from awq.kernels.cuda import workspace
from tests.kernels.plain import CPU

STREAM = 0x7000_0000_1000


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)  # with which torch.cuda.stream does nothing
    monkeypatch.setattr(workspace, "_device", lambda index: CPU)
    monkeypatch.setattr(workspace, "_flags", {})
    monkeypatch.setattr(workspace, "_captures", {})
    workspace._places.clear()
    yield
    workspace._places.clear()


def test_one_workspace_a_stream_that_grows() -> None:
    first = workspace.workspace(0, STREAM, 1000)
    assert workspace.workspace(0, STREAM, 500) is first
    assert first.partial == first.flags + workspace.FLAG_BYTES and first.memory is not None
    assert first.memory.numel() == workspace.FLAG_BYTES + 1000 and not first.memory[: workspace.FLAG_BYTES].any()
    assert workspace.workspace(0, STREAM + 8, 1000) is not first
    second = workspace.workspace(0, STREAM, 2000)
    assert second.size == 2000 and workspace.workspace(0, STREAM, 1000) is second
    for stream in range(100):
        workspace.workspace(0, stream, 16)
    assert len(workspace._places) == 64


def test_a_workspace_is_allocated_apart_from_this_threads_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, cleared = [], workspace._cleared
    monkeypatch.setattr(
        workspace, "_cleared", lambda *size: threads.append(threading.current_thread()) or cleared(*size)
    )
    workspace.workspace(0, STREAM, 1000)
    assert threads != [threading.current_thread()]


def test_nothing_of_a_capture_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is its graph's, which goes with it; what is eager stays however many graphs there are."""
    eager = workspace.workspace(0, STREAM, 1000)
    workspace._flags.clear()
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    for _ in range(100):
        captured = workspace.workspace(0, STREAM, 1000)
        assert captured is not eager and captured.memory is not None
    memory = weakref.ref(captured.memory)
    del captured
    assert memory() is None
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
    assert workspace.workspace(0, STREAM, 1000) is eager


def test_threads_share_a_workspace() -> None:
    with ThreadPoolExecutor(8) as pool:
        places = list(pool.map(lambda _: workspace.workspace(0, STREAM, 1000), range(64)))
    assert {place.flags for place in places} == {places[0].flags}


def test_captured_calls_share_cleared_flags_by_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clearing in the graph: it would part the kernel from the one ahead of it."""
    workspace.workspace(0, STREAM, 1000)  # the first call of a stream
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: True)
    seen = []
    for capture in (7, 7, 9, *range(20, 200)):
        monkeypatch.setattr(workspace.jit, "capture_id", lambda stream, number=capture: number)
        place = workspace.workspace(0, STREAM, 1000)
        assert place.memory is not None and place.memory.numel() == 1000
        seen.append(place.flags - workspace._flags[0].data_ptr())
    assert seen[0] == seen[1] and len(set(seen)) == workspace._CAPTURES
    assert max(seen) + workspace.FLAG_BYTES <= workspace._flags[0].numel() and not workspace._flags[0].any()
