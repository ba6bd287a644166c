"""libcuda through ctypes: its calls by name, their errors as sentences, and the context of a thread.

Its C interface is the same for every CUDA 12 and 13 driver, and torch has loaded it already: a warm start imports
nothing for it. torch makes each device's primary context; kernels run there.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

from awq.errors import KernelError, KernelNotSupportedError

# CUresult
INVALID_VALUE, INVALID_CONTEXT = 1, 201
# What loading gives for code that this driver or this GPU does not take: invalid image, no binary for this GPU,
# invalid PTX, unsupported PTX version.
UNLOADABLE = frozenset({200, 209, 218, 222})


class Driver:
    """Every call takes ctypes objects, or None for a null pointer: a bare int would be cut to 32 bits."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.check("start", library.cuInit(0))

    def check(self, what: str, code: int) -> None:
        """Raise KernelError, "CUDA could not <what>: ..." unless a call returned 0."""
        if code:
            raise KernelError(f"CUDA could not {what}: {self.describe(code)}.")

    def describe(self, code: int) -> str:
        """209 -> "CUDA_ERROR_NO_BINARY_FOR_GPU, no kernel image is available for execution on the device" """
        texts = []
        for call in (self.library.cuGetErrorName, self.library.cuGetErrorString):
            text = ctypes.c_char_p()
            if not call(code, ctypes.byref(text)) and text.value:
                texts.append(text.value.decode())
        return ", ".join(texts) or f"error {code}"

    def version(self) -> str:
        """The newest CUDA that the driver runs, such as "13.0"."""
        number = ctypes.c_int()
        self.check("tell its version", self.library.cuDriverGetVersion(ctypes.byref(number)))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def enter(self) -> int:
        """The device of this thread's context. A thread that has none yet enters that of torch's current device."""
        context = ctypes.c_void_p()
        self.check("tell the current context", self.library.cuCtxGetCurrent(ctypes.byref(context)))
        if not context.value:
            import torch

            index = torch.cuda.current_device()
            self.check("open the GPU", self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), index))
            self.check("open the GPU", self.library.cuCtxSetCurrent(context))
        device = ctypes.c_int()
        self.check("tell the current device", self.library.cuCtxGetDevice(ctypes.byref(device)))
        return device.value

    def capture_id(self, stream: int) -> int:
        """The number of the capture that `stream` is in, unlike any other of this process; 0 outside of one."""
        status, number = ctypes.c_int(), ctypes.c_uint64()
        pointers = (ctypes.byref(status), ctypes.byref(number), None, None, None)
        self.check("tell the capture", self.library.cuStreamGetCaptureInfo_v2(ctypes.c_void_p(stream), *pointers))
        return number.value

    def devices(self) -> set[int]:
        """The devices in use in this process: those whose primary context exists."""
        count, flags, active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
        self.check("count the GPUs", self.library.cuDeviceGetCount(ctypes.byref(count)))
        found = set()
        for device in range(count.value):
            state = self.library.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
            if not state and active.value:
                found.add(device)
        return found


@cache
def driver() -> Driver:
    """The NVIDIA driver of this machine. Raises KernelNotSupportedError where there is none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise KernelNotSupportedError(
            f"There is no NVIDIA driver here ({name} does not load): install it, or use the CPU."
        ) from error
    if not hasattr(library, "cuLibraryLoadData"):
        raise KernelNotSupportedError("The NVIDIA driver is older than CUDA 12: update it.")
    return Driver(library)
