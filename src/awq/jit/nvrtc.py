"""CUDA C++ to a cubin for one architecture, by NVRTC through `cuda.core`: no GPU, driver or toolkit is needed."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from awq.errors import KernelError, MissingDependencyError

Defines = Mapping[str, int | str]

# What every kernel is compiled with, besides its architecture and defines.
OPTIONS: dict[str, str | bool] = {"std": "c++17", "device_as_default_execution_space": True}
_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
# Around the errors of a log: the code that cuda.core puts first, and their count at the end.
_NO_REASON = re.compile(r"\d+: NVRTC_ERROR|\d+ errors? detected")
# cuda.core cannot be imported by two threads at a time.
_IMPORTING = threading.Lock()
_BROKEN = (ImportError, OSError, RuntimeError)  # what cuda.core and cuda.bindings raise that do not find a library
_LOG_LINES = 3  # of the compiler's errors in a message


@dataclass(frozen=True)
class Compiled:
    """cubin: the binary; log: the compiler's warnings, "" where it has none."""

    cubin: bytes
    log: str


def resolve(source: Path) -> str:
    """The text of `source` with every `#include "..."` replaced by that file, found beside the including one.

    A header comes in once, where it is first included, so includes belong outside of #if. #line directives keep the
    compiler's messages on the files' own names and lines. Raises KernelError for a file that is not there.
    """
    return _resolve(source, set())


def _resolve(source: Path, seen: set[Path]) -> str:
    seen.add(source.resolve())
    lines = [f'#line 1 "{source.name}"']
    for number, line in enumerate(source_text(source).splitlines(), start=1):
        if found := _INCLUDE.match(line):
            header = source.parent / found[1]
            if header.resolve() not in seen:
                lines.append(_resolve(header, seen))
            lines.append(f'#line {number + 1} "{source.name}"')
        else:
            lines.append("" if _ONCE.match(line) else line)
    return "\n".join(lines)


@cache
def source_text(source: Path) -> str:
    """Read once a process: a container's file system may take a millisecond a file, and headers come in many times."""
    try:
        return source.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise KernelError(f"The kernel source {source} is missing: reinstall awq-int4.") from error


def compile_text(text: str, name: str, arch: str, defines: Defines, verbose: bool = False) -> Compiled:
    """Compile `text`, called `name` in messages, for `arch`, such as "sm_90a".

    verbose: ptxas adds each kernel's registers, shared memory and spills to the log
    Raises MissingDependencyError without a compiler, KernelError where it knows no such architecture or rejects `text`.
    """
    require()
    if re.sub(r"[af]$", "", arch) not in (known := architectures()):
        raise KernelError(f"NVRTC {version()} compiles nothing for {arch}: it knows {', '.join(known)}.")
    with _IMPORTING, _working():
        from cuda.core import Program, ProgramOptions

    macros = [(key, str(value)) for key, value in defines.items()]
    extra = {"ptxas_options": ["-v"]} if verbose else {}
    options = ProgramOptions(name=name, arch=arch, define_macro=macros or None, **OPTIONS, **extra)
    log, start = io.StringIO(), time.perf_counter()
    try:
        with _working():
            cubin = bytes(Program(text, "c++", options).compile("cubin", logs=log).code)
    except MissingDependencyError:
        raise
    except Exception as error:  # cuda.core exports no class of its own errors
        raise KernelError(f"{name} does not compile for {arch} by NVRTC {version()}: {_gist(str(error))}.") from error
    seconds = time.perf_counter() - start
    logging.getLogger("awq").debug("%s%s compiled for %s in %.2f s", name, dict(defines) or "", arch, seconds)
    return Compiled(cubin, log.getvalue().strip("\0 \n"))


def _gist(log: str) -> str:
    """The first errors of a compiler's log, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line and not _NO_REASON.match(line)]
    return "; ".join((errors or lines)[:_LOG_LINES]).rstrip(".")


def architectures() -> list[str]:
    """Every architecture that the installed NVRTC compiles for, oldest first: ["sm_75", ..., "sm_90", "sm_100", ...]"""
    require()
    return [f"sm_{number}" for number in _supported()]


@cache
def _supported() -> tuple[int, ...]:
    with _working():
        from cuda.bindings import nvrtc

        code, numbers = nvrtc.nvrtcGetSupportedArchs()
    if int(code):
        raise KernelError(f"NVRTC does not say which architectures it knows ({code.name}): reinstall it.")
    return tuple(sorted(numbers))


def arch_of(capability: tuple[int, int]) -> str:
    """(8, 6) -> "sm_86", (9, 0) -> "sm_90a": from 9.0 with the instructions that only this generation has."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def require() -> None:
    """Raise MissingDependencyError where nothing can be compiled."""
    if reason := missing():
        raise _absent(reason)


def _absent(reason: str) -> MissingDependencyError:
    return MissingDependencyError(f"No CUDA kernel can be compiled: {reason}.")


@contextmanager
def _working() -> Iterator[None]:
    """Installed is not whole: where the compiler or its bindings do not load, MissingDependencyError."""
    try:
        yield
    except _BROKEN as error:
        raise _absent(_broken(error)) from error


def _broken(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"NVRTC, CUDA's run-time compiler, does not load ({reason}): {_command()}"


def _command() -> str:
    return f'pip install "awq-int4[cu{_torch_major() or 13}]"'


@cache
def missing() -> str | None:
    """Why nothing can be compiled here, with the way out, as a clause; None where it can."""
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    wanted = _torch_major()
    command = _command()
    for package in ("cuda-core", "cuda-bindings"):
        if _installed(package) is None:
            return f"the package {package} is not installed: {command}"
    bindings = _installed("cuda-bindings") or ""
    if wanted and _major(bindings) != wanted:
        return f"cuda-bindings {bindings} is for another CUDA than torch, which is for {wanted}: {command}"
    try:
        version()
    except _BROKEN as error:
        return _broken(error)
    return None


@cache
def version() -> str:
    """NVRTC's version, such as "13.5.37".

    From the metadata of its wheel, because loading the library costs more than the rest of a warm start.
    """
    major = _major(_installed("cuda-bindings") or "")
    for wheel in (f"nvidia-cuda-nvrtc-cu{major}", "nvidia-cuda-nvrtc"):
        found = _installed(wheel)
        if found and _major(found) == major:
            return found
    from cuda.bindings import nvrtc

    code, *numbers = nvrtc.nvrtcVersion()
    if int(code):
        raise RuntimeError(f"nvrtcVersion: {code.name}")
    return ".".join(map(str, numbers))


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)


def _torch_major() -> int | None:
    """The CUDA major that torch was built for; None for a build without CUDA."""
    import torch

    return _major(torch.version.cuda) if torch.version.cuda else None
