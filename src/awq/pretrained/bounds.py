"""Bounds on what a stranger's template may take of this process: time and memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

# The templates of published models take milliseconds and kilobytes.
SECONDS = 10.0
BYTES = 1 << 30
_STATM = Path("/proc/self/statm")


@contextmanager
def bounded(seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """TimeoutError after `seconds`, MemoryError where Python takes `more_bytes` beyond what the process has.

    For short work in the main thread: both limits are the process's own. Elsewhere, and on systems that have no such
    limits, there are none; jinja's sandbox, which keeps a template from attributes and files, does not need them.
    """
    with _deadline(seconds), limited_memory(more_bytes):
        yield


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def limited_memory(more_bytes: int) -> Iterator[None]:
    """MemoryError where the process, from its main thread on Linux, takes `more_bytes` beyond what it has."""
    if threading.current_thread() is not threading.main_thread() or not _STATM.exists():
        yield
        return
    import resource

    taken = int(_STATM.read_text().split()[0]) * resource.getpagesize()
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (before, most, taken + more_bytes) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), most))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {more_bytes / 1e9:.1f} GB") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
