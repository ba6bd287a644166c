"""`awq hardware`: the devices of this machine, and which kernel versions run on each."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from awq.cli import options
from awq.cli.output import format_bytes, print_json, print_table
from awq.config import KERNEL_VERSIONS

if TYPE_CHECKING:
    from awq.hardware import Device


def hardware(as_json: options.Json = False) -> None:
    """Show this machine's devices and what runs on them."""
    from awq.hardware import describe, detect

    devices = [*detect(), describe("cpu")]
    verdicts = [[judge(device, version) for version in KERNEL_VERSIONS] for device in devices]
    if as_json:
        print_json([{**asdict(device), "versions": verdict} for device, verdict in zip(devices, verdicts, strict=True)])
        return
    columns = ("device", "torch", "memory", "version", "", "how, or why not")
    rows = [row for device, verdict in zip(devices, verdicts, strict=True) for row in _rows(device, verdict)]
    print_table("Kernel versions by device", columns, rows)


def judge(device: Device, version: str) -> dict[str, Any]:
    """Whether a version runs on a device, and how it does or why not."""
    from awq.errors import KernelNotSupportedError
    from awq.kernels import select_kernel_version

    try:
        choice = select_kernel_version(version=version, device=device)
    except KernelNotSupportedError as error:
        return {"version": version, "available": False, "reason": str(error)}
    return {"version": version, "available": True, "reason": f"by the kernel {choice.kernel!r}: {choice.how}"}


def _rows(device: Device, verdicts: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    memory = format_bytes(device.memory_bytes) if device.memory_bytes else None
    first = (str(device), device.torch_device, memory)
    return [
        (
            *(first if index == 0 else ("", "", "")),
            verdict["version"],
            "available" if verdict["available"] else "not available",
            verdict["reason"],
        )
        for index, verdict in enumerate(verdicts)
    ]
