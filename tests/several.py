"""Several processes that know of each other as torchrun's do, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from awq.algorithm import ranks
from awq.algorithm.inputs import capture

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["awq.cli.app", "awq.model", "tests.several", "tests.tiny"])


def run(size: int, work: Callable[..., Any], *args: Any, seconds: float = 120) -> list[Any]:
    """What `work(*args)` returns or raises in each of `size` processes, of tiny chunks and slabs, in order.

    None where a process was killed.
    """
    results = SERVER.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [SERVER.Process(target=_child, args=(rank, size, port, results, work, args)) for rank in range(size)]
    for child in children:
        child.start()
    try:
        found = _gather(results, children, time.monotonic() + seconds)
    finally:
        for child in children:
            child.join(5)
            child.kill()
    return [found.get(rank) for rank in range(size)]


def _gather(results: Any, children: Sequence[Any], deadline: float) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while len(found) < len(children):
        alive = any(child.is_alive() for child in children)
        try:
            found.update([results.get(timeout=1)])
        except queue.Empty:
            if not alive:
                return found
            if time.monotonic() > deadline:
                raise
    return found


def _child(rank: int, size: int, port: int, results: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    capture.CHUNK_TOKENS, ranks.SLAB = 128, 1 << 12
    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    try:
        result = work(*args)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  whatever it is, the test shows it
        result = error
    results.put((rank, result))
