"""Runs of a process of their own that can be killed, forked from one that has imported everything.

Started as a program, it reads one request a line, {"run": {...}, "kill": [place, count]}, forks, and answers with how
the fork ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Runner:
    """Runs `quantize_folder` in forks."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.pipeline.killed"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def run(self, *, kill: tuple[str, float] | None = None, **arguments: Any) -> dict[str, Any]:
        """What became of it: {"signal": number} or {"code": number}, what it said, and the blocks that it solved."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"run": arguments, "kill": kill}, default=str) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.communicate()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without
    os.kill(os.getpid(), signal.SIGINT)


def before(owner: Any, name: str, count: int, act: Callable[..., None]) -> None:
    """`act`, with the arguments of the call, before the call number `count` of a function."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            act(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def half(handle: int, position: int, data: memoryview) -> None:
    os.pwrite(handle, data[: len(data) // 2], position)
    die()


def half_a_line(journal: Any, _entry: Any) -> None:
    journal._file.write(b'00112233445566778899aabbccddeeff {"block":"model.la')
    journal._file.flush()
    die()


def arm(place: str, count: float) -> None:
    """Let this process die at the `count`-th time that it comes to `place`."""
    from awq.algorithm import blocks
    from awq.checkpoint import journal, output, shards, slots
    from awq.pipeline import run

    def silent(*_arguments: Any) -> None:
        die()

    places: dict[str, Callable[[int], None]] = {
        "block": lambda n: before(blocks.BlockLoop, "_solve", n, silent),
        "rounding": lambda n: before(blocks, "_plainly", n, silent),
        "after a block": lambda n: before(run.Run, "add", n, silent),
        "tensor": lambda n: before(slots, "_write_at", n, half),
        "outliers of a block": lambda n: before(run, "_save", n, silent),
        "journal": lambda n: before(journal.Journal, "add", n, silent),
        "journal line": lambda n: before(journal.Journal, "add", n, half_a_line),
        "allocation": lambda n: before(slots, "_reserve", n, silent),
        "outlier shard": lambda n: before(shards, "save_file", n, silent),
        "index": lambda n: before(slots, "write_json", n, silent),
        "config": lambda n: before(run, "write_json", n, silent),
        "rename": lambda n: before(output, "_replace", n, silent),
        "after the rename": lambda n: before(run.shutil, "rmtree", n, silent),
        "interrupt": lambda n: before(blocks.BlockLoop, "_solve", n, lambda *_: interrupt()),
    }
    if place == "time":
        threading.Thread(target=lambda: (time.sleep(count), die()), daemon=True).start()
    else:
        places[place](int(count))


@contextmanager
def noted(file: Path) -> Iterator[None]:
    """Append to `file` the index of each block that is solved."""
    from awq.algorithm.blocks import BlockLoop

    solve = BlockLoop._solve

    def noting(self: Any, block: Any, index: int, stored_in: Any) -> Any:
        results = solve(self, block, index, stored_in)
        with file.open("a") as out:
            out.write(f"{index}\n")
        return results

    BlockLoop._solve = noting  # type: ignore[method-assign]
    yield


def child(request: dict[str, Any], said: Path) -> int:
    from awq.config import QuantConfig
    from awq.errors import AwqError
    from awq.pipeline.recipe import quantize_folder

    if request["kill"]:
        arm(*request["kill"])
    arguments = dict(request["run"])
    config = QuantConfig(**arguments.pop("config"))
    with noted(said.with_suffix(".blocks")):
        try:
            quantize_folder(arguments.pop("source"), arguments.pop("output"), config, **arguments)
        except (AwqError, KeyboardInterrupt) as error:
            said.write_text(str(error))
            return 2
    return 0


def serve() -> None:
    import tempfile

    import torch

    import awq.pipeline.recipe  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            said = Path(folder) / "said.txt"
            process = os.fork()
            if not process:
                code = 1
                with contextlib.suppress(BaseException):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    code = child(json.loads(line), said)
                os._exit(code)
            _, status = os.waitpid(process, 0)
            blocks = said.with_suffix(".blocks")
            answer = {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                "said": said.read_text() if said.exists() else "",
                "solved": [int(index) for index in blocks.read_text().split()] if blocks.exists() else [],
            }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
