"""Cubins as callable kernels: loaded once for all devices, launched from objects that are made once."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import overload

from awq.errors import KernelError, KernelNotSupportedError
from awq.jit.driver import INVALID_CONTEXT, INVALID_VALUE, UNLOADABLE, driver

_PARAMS_ALIGNMENT = 64  # of a CUtensorMap inside of the parameters
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID

# The enumerations of cuTensorMapEncodeTiled, by torch's dtype names and by bytes.
_TENSOR_TYPES = {
    "uint8": 0,
    "uint16": 1,
    "uint32": 2,
    "int32": 3,
    "uint64": 4,
    "int64": 5,
    "float16": 6,
    "float32": 7,
    "bfloat16": 9,
}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}
_TENSOR_MAP_BYTES = 128


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and 64 bytes of which the attributes used here take the first three words."""

    _fields_ = [("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def _config(grid: int, block: int, shared: int, attribute: _Attribute | None) -> _Config:
    pointer = ctypes.pointer(attribute) if attribute else None
    return _Config((grid, 1, 1), (block, 1, 1), shared, None, pointer, 1 if attribute else 0)


class Library:
    """A cubin in the driver, for every device of the process.

    name:     of its source, arch: what it was compiled for, compiler: NVRTC's version; for messages
    Raises KernelNotSupportedError where the driver or the GPU does not take it.
    """

    def __init__(self, cubin: bytes, name: str, arch: str, compiler: str) -> None:
        self.cubin, self.name, self.arch, self.compiler = cubin, name, arch, compiler
        self.handle = ctypes.c_void_p()
        load = driver().library.cuLibraryLoadData
        self.check("load", load(ctypes.byref(self.handle), cubin, None, None, 0, None, None, 0))

    def check(self, what: str, code: int) -> None:
        if not code:
            return
        reason = driver().describe(code)
        if code not in UNLOADABLE:
            raise KernelError(f"CUDA could not {what} {self.name} for {self.arch}: {reason}.")
        made = f"compiled by NVRTC {self.compiler} for {self.arch}"
        raise KernelNotSupportedError(
            f"The NVIDIA driver (for CUDA {driver().version()}) cannot load {self.name}, {made} ({reason}): "
            "update the driver, or install torch and awq-int4 for an older CUDA."
        )


class Kernel:
    """One `extern "C"` kernel of a library; its only argument is a struct passed by value."""

    def __init__(self, library: Library, name: str) -> None:
        self.library, self.name = library, name
        self.handle = ctypes.c_void_p()
        find = driver().library.cuLibraryGetKernel
        library.check(f"find {name} in", find(ctypes.byref(self.handle), library.handle, name.encode()))
        self._lock = threading.Lock()
        self._shared: dict[int, int] = {}  # device -> the dynamic shared memory that it allows a block

    def global_int(self, name: str) -> int:
        """The value of `extern "C" __device__ const int name`, from the binary: no GPU is asked."""
        return constant(self.library.cubin, name)

    def launcher(self, grid: int, block: int, shared: int, size: int, pdl: bool = False) -> Launcher:
        """A launch of `grid` blocks of `block` threads, with `shared` bytes of dynamic shared memory each.

        size: bytes of the parameter struct
        pdl:  may start before the kernel ahead of it in the stream has finished (programmatic dependent launch)
        """
        return Launcher(self, grid, block, shared, size, pdl)

    def clusters(self, size: int, block: int, shared: int) -> int:
        """How many clusters of `size` blocks the current device runs at once: it may be fewer than its SMs / size."""
        self.ready(shared)
        attribute, count = _Attribute(_CLUSTER_DIMENSION, 0, (size, 1, 1)), ctypes.c_int()
        config = _config(size, block, shared, attribute)
        query = driver().library.cuOccupancyMaxActiveClusters
        code = query(ctypes.byref(count), self.handle, ctypes.byref(config))
        driver().check(f"tell how many clusters {self.name} takes", code)
        return count.value

    def ready(self, shared: int) -> None:
        """Load the kernel on this thread's device, and allow it `shared` bytes on every device in use."""
        cuda = driver()
        current, function = cuda.enter(), ctypes.c_void_p()
        self.library.check("load", cuda.library.cuKernelGetFunction(ctypes.byref(function), self.handle))
        with self._lock:
            for device in {current, *cuda.devices()}:
                if shared <= self._shared.get(device, 0):
                    continue
                code = cuda.library.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, shared, self.handle, device)
                if device == current:  # another may be of an architecture that this cubin is not for
                    cuda.check(f"give a block of {self.name} {shared} bytes of shared memory", code)
                if not code:
                    self._shared[device] = shared


class Launcher:
    """One launch, made once and called often, in whichever stream.

    params: the parameter struct, aligned to 64 bytes, to be packed before the call; the call copies it
    lock:   to be held from packing to the end of the call where several threads share this launcher
    """

    __slots__ = ("_arguments", "_config", "_keep", "_kernel", "_launch", "_shared", "_stream", "lock", "params")

    def __init__(self, kernel: Kernel, grid: int, block: int, shared: int, size: int, pdl: bool) -> None:
        kernel.ready(shared)
        buffer = (ctypes.c_ubyte * (size + _PARAMS_ALIGNMENT))()
        start = -ctypes.addressof(buffer) % _PARAMS_ALIGNMENT
        self.params = memoryview(buffer).cast("B")[start : start + size]
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer) + start)
        attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)) if pdl else None
        self.lock = threading.Lock()
        self._config, self._stream = _config(grid, block, shared, attribute), 0
        self._kernel, self._shared, self._keep = kernel, shared, (buffer, attribute)
        self._launch = driver().library.cuLaunchKernelEx
        self._arguments = (ctypes.byref(self._config), kernel.handle, pointers, None)

    def __call__(self, stream: int) -> None:
        """Launch in the stream of this handle (torch.cuda.Stream.cuda_stream; 0 is the default stream).

        The default stream is that of the thread's current device. Raises KernelError with the driver's reason.
        """
        if stream != self._stream:
            self._config.stream = self._stream = stream
        if code := self._launch(*self._arguments):
            self._launch_again(code)

    def _launch_again(self, code: int) -> None:
        """After what a thread or a device costs at its first launch: it has no context, or not the shared memory."""
        if code in (INVALID_CONTEXT, INVALID_VALUE):
            self._kernel.ready(self._shared)
            code = self._launch(*self._arguments)
        driver().check(f"launch {self._kernel.name}", code)


_programmatic = ContextVar("programmatic", default=True)


@overload
def programmatic() -> bool: ...
@overload
def programmatic(on: bool) -> AbstractContextManager[None]: ...
def programmatic(on: bool | None = None) -> bool | AbstractContextManager[None]:
    """Whether kernels are launched to start before their predecessor ends, where they can be (`pdl` of a launcher).

    `with programmatic(False):` launches without in this thread, to measure the difference.
    """
    return _programmatic.get() if on is None else _programmatically(on)


@contextmanager
def _programmatically(on: bool) -> Iterator[None]:
    token = _programmatic.set(on)
    try:
        yield
    finally:
        _programmatic.reset(token)


def tensor_map(
    ptr: int, dtype: str, dims: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int, promotion: int
) -> bytes:
    """A CUtensorMap, 128 bytes, for bulk tensor copies; elements out of bounds are read as 0.

    ptr:       16-byte aligned device address
    dtype:     of an element, by torch's name: "uint8", "float16", "bfloat16", "uint64", ...
    dims:      elements along each dimension, innermost first
    strides:   bytes from one to the next along each dimension but the innermost, multiples of 16
    box:       elements copied along each dimension
    swizzle:   bytes: 0, 32, 64 or 128
    promotion: bytes that a read brings into the L2 cache: 0, 64, 128 or 256
    Raises KernelError where the driver refuses these values.
    """
    shape = _tensor_shape(dtype, tuple(dims), tuple(strides), tuple(box), swizzle, promotion)
    buffer = (ctypes.c_uint64 * (2 * _TENSOR_MAP_BYTES // 8))()
    address = ctypes.addressof(buffer) + -ctypes.addressof(buffer) % _PARAMS_ALIGNMENT
    encode = driver().library.cuTensorMapEncodeTiled
    code = encode(ctypes.c_void_p(address), shape[0], shape[1], ctypes.c_void_p(ptr), *shape[2:])
    driver().check(f"describe a tensor of {dtype} {tuple(dims)}, strides {tuple(strides)}, box {tuple(box)}", code)
    return ctypes.string_at(address, _TENSOR_MAP_BYTES)


@lru_cache(maxsize=512)
def _tensor_shape(
    dtype: str, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int, promotion: int
) -> tuple[object, ...]:
    """The arguments of cuTensorMapEncodeTiled but its addresses."""
    rank = len(dims)
    if len(strides) != rank - 1 or len(box) != rank:
        raise KernelError(f"A tensor map of {rank} dims takes {rank - 1} strides and a box of {rank} extents.")
    halves = ctypes.c_uint32 * rank
    return (
        _TENSOR_TYPES[dtype],
        rank,
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        halves(*box),
        halves(*[1] * rank),
        0,  # not interleaved
        _SWIZZLES[swizzle],
        _PROMOTIONS[promotion],
        0,  # zeros out of bounds
    )


def constant(cubin: bytes, name: str) -> int:
    """The value of `extern "C" __device__ const int name` in a cubin, an ELF file. Raises KernelError without one."""
    (table,), (entry, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    # Of each section: type, file offset, size, link (of a symbol table: the section of its names).
    sections = [struct.unpack_from("<4xI16xQQI", cubin, table + entry * index) for index in range(count)]
    for kind, offset, size, link in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for symbol in range(offset, offset + size, 24):
            string, section, value, length = struct.unpack_from("<I2xHQQ", cubin, symbol)
            start = sections[link][1] + string
            if length == 4 and section < count and cubin[start:].startswith(name.encode() + b"\0"):
                return int(struct.unpack_from("<i", cubin, sections[section][1] + value)[0])
    raise KernelError(f"The kernel's binary has no int called {name}.")


def capture_id(stream: int) -> int:
    """The number of the CUDA graph capture that `stream` is in, unlike any other of this process; 0 outside of one."""
    return driver().capture_id(stream)
