"""CUDA kernels compiled when first used, for the GPU at hand: source -> cubin (kept on disk) -> callable kernel."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from awq.jit import nvrtc
from awq.jit.cache import cache_folder, fetch, key_of, replace_file
from awq.jit.launch import Kernel, Launcher, Library, capture_id, programmatic, tensor_map
from awq.jit.nvrtc import Compiled, Defines, arch_of, architectures, missing, source_text

__all__ = [
    "Compiled",
    "Kernel",
    "Launcher",
    "arch_of",
    "architectures",
    "cache_folder",
    "capture_id",
    "compile_cubin",
    "compile_source",
    "kernel",
    "missing",
    "prefetch",
    "programmatic",
    "replace_file",
    "source_text",
    "tensor_map",
]

_WORKERS = 8  # compiling threads: beyond that a model's handful of sources gains nothing


class _Unit(NamedTuple):
    """What one cubin is made from; `defines` sorted."""

    source: Path
    arch: str
    defines: tuple[tuple[str, int | str], ...]


# Guarded by the lock: cubins that are being compiled, and what is loaded.
_lock = threading.Lock()
_running: dict[_Unit, Future[bytes]] = {}
_libraries: dict[_Unit, Library] = {}
_kernels: dict[tuple[_Unit, str], Kernel] = {}


def kernel(source: Path, name: str, arch: str, defines: Defines | None = None) -> Kernel:
    """The `extern "C"` kernel `name` of a CUDA C++ file: loaded, after compiling it if no process did so before.

    arch: such as "sm_90a" (see `arch_of`); defines: macros
    Raises MissingDependencyError without a compiler, KernelError where it rejects the source, KernelNotSupportedError
    where the driver does not take the result, ConfigError for a cache folder that others may write.
    """
    unit = _unit(source, arch, defines)
    if found := _kernels.get((unit, name)):
        return found
    if unit not in _libraries:
        cubin = _cubin(unit)
        with _lock:
            if unit not in _libraries:
                _libraries[unit] = Library(cubin, source.name, arch, nvrtc.version())
            _running.pop(unit, None)
    with _lock:
        if (unit, name) not in _kernels:
            _kernels[unit, name] = Kernel(_libraries[unit], name)
        return _kernels[unit, name]


def prefetch(requests: Iterable[tuple[Path, str, str, Defines]]) -> None:
    """Start to compile, in threads, what `kernel` will be asked for: its arguments, one tuple a kernel.

    Returns at once. `kernel` waits for what has begun, does itself what has not, and raises what went wrong.
    """
    with _lock:
        units = dict.fromkeys(_unit(source, arch, defines) for source, _, arch, defines in requests)
        new = [unit for unit in units if unit not in _running and unit not in _libraries]
        if new:
            pool = ThreadPoolExecutor(min(_WORKERS, len(new), os.cpu_count() or 1), "awq-jit")
            _running.update({unit: pool.submit(_fetch, unit) for unit in new})
            pool.shutdown(wait=False)


def compile_source(source: Path, arch: str, defines: Defines | None = None, verbose: bool = False) -> Compiled:
    """Compile a file, neither kept nor loaded: its cubin, and the compiler's log with its warnings.

    verbose: the log has each kernel's registers and spills too
    """
    return nvrtc.compile_text(nvrtc.resolve(source), source.name, arch, defines or {}, verbose)


def compile_cubin(source: Path, arch: str, defines: Defines | None = None) -> bytes:
    """Compile a file, neither kept nor loaded."""
    return compile_source(source, arch, defines).cubin


def _unit(source: Path, arch: str, defines: Defines | None) -> _Unit:
    return _Unit(source, arch, tuple(sorted((defines or {}).items())))


def _cubin(unit: _Unit) -> bytes:
    """Compiled in this thread, unless another is at it."""
    with _lock:
        future = _running.get(unit)
        mine = future is None or future.cancel()
        if mine:
            future = _running[unit] = Future()
            future.set_running_or_notify_cancel()  # no longer to be taken over
    assert future is not None
    try:
        if mine:
            _fulfil(future, unit)
        return future.result()
    except BaseException:
        with _lock:
            if _running.get(unit) is future:
                del _running[unit]  # the next caller tries again
        raise


def _fulfil(future: Future[bytes], unit: _Unit) -> None:
    try:
        future.set_result(_fetch(unit))
    except BaseException as error:  # whoever waits raises it too
        future.set_exception(error)
        raise


def _fetch(unit: _Unit) -> bytes:
    nvrtc.require()
    text, defines = nvrtc.resolve(unit.source), dict(unit.defines)
    key = key_of(text, unit.defines, unit.arch, nvrtc.OPTIONS, nvrtc.version())
    return fetch(key, lambda: nvrtc.compile_text(text, unit.source.name, unit.arch, defines).cubin)
