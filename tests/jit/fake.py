"""A driver that launches nothing: it hands out handles and keeps what it was asked."""

from __future__ import annotations

import ctypes
from typing import Any

ERRORS = {
    1: "INVALID_VALUE",
    2: "OUT_OF_MEMORY",
    201: "INVALID_CONTEXT",
    209: "NO_BINARY_FOR_GPU",
    719: "LAUNCH_FAILED",
}


class FakeLibrary:
    """Two devices, of which `active` are in use. `fails` has the codes to return, by call, first to last."""

    def __init__(self) -> None:
        self.current, self.active = 0, {0}
        self.context: int | None = 0x7F00_0000_0001
        self.fails: dict[str, list[int]] = {}
        self.launches: list[dict[str, Any]] = []
        self.attributes: list[tuple[int, int, int]] = []
        self.loads = 0
        self.maps: list[tuple[Any, ...]] = []

    def _code(self, call: str) -> int:
        codes = self.fails.get(call)
        return codes.pop(0) if codes else 0

    def cuInit(self, flags: int) -> int:
        return self._code("init")

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12040
        return 0

    def cuGetErrorName(self, code: int, text: Any) -> int:
        text._obj.value = f"CUDA_ERROR_{ERRORS[code]}".encode() if code in ERRORS else None
        return int(code not in ERRORS)

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"why" if code in ERRORS else None
        return int(code not in ERRORS)

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.context
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context._obj.value = 0x7F00_0000_0001 + device
        self.current = device
        return self._code("retain")

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.context = context.value
        return 0

    def cuCtxGetDevice(self, device: Any) -> int:
        device._obj.value = self.current
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDevicePrimaryCtxGetState(self, device: int, flags: Any, active: Any) -> int:
        active._obj.value = device in self.active
        return 0

    def cuLibraryLoadData(self, handle: Any, cubin: bytes, *options: Any) -> int:
        self.loads += 1
        handle._obj.value = 0x7F00_0000_1000 + self.loads
        assert options == (None, None, 0, None, None, 0)
        return self._code("load")

    def cuLibraryGetKernel(self, handle: Any, library: Any, name: bytes) -> int:
        handle._obj.value = library.value + 0x100
        return self._code("find")

    def cuKernelGetFunction(self, function: Any, kernel: Any) -> int:
        return self._code("function")

    def cuKernelSetAttribute(self, attribute: int, value: int, kernel: Any, device: int) -> int:
        self.attributes.append((attribute, value, device))
        return self._code(f"attribute {device}")

    def cuOccupancyMaxActiveClusters(self, count: Any, kernel: Any, config: Any) -> int:
        attribute = config._obj.attributes[0]
        count._obj.value = 132 // attribute.value[0]
        self.launches.append({"cluster": (attribute.id, *attribute.value[:3]), "shared": config._obj.shared})
        return self._code("clusters")

    def cuLaunchKernelEx(self, config: Any, kernel: Any, params: Any, extra: Any) -> int:
        assert extra is None
        if code := self._code("launch"):
            return code
        made = config._obj
        attributes = [made.attributes[i] for i in range(made.attribute_count)]
        self.launches.append(
            {
                "grid": tuple(made.grid),
                "block": tuple(made.block),
                "shared": made.shared,
                "stream": made.stream or 0,
                "attributes": [(one.id, one.value[0]) for one in attributes],
                "kernel": kernel.value,
                "address": params[0],
                "params": ctypes.string_at(params[0], 16),
            }
        )
        return 0

    def cuTensorMapEncodeTiled(self, out: Any, *arguments: Any) -> int:
        assert out.value % 64 == 0
        ctypes.memset(out.value, 0xAB, 128)
        self.maps.append(tuple(list(one) if hasattr(one, "_length_") else one for one in arguments))
        return self._code("map")
