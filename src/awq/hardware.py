"""What GPU is this: name, compute capability, memory, and whether kernels can run on it.

NVIDIA GPUs are found through NVML, else `nvidia-smi`, else torch; ROCm and Apple GPUs through torch.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from awq.capability import MIN_CAPABILITY, OWN_KERNELS, Capability, known_capability, parse_capability, series, show
from awq.errors import ConfigError

__all__ = ["Device", "default_device", "describe", "detect", "driver_version", "parse_capability", "refusal"]

_SMI_FIELDS = "index,name,compute_cap,memory.total,uuid"
_SMI_TIMEOUT = 10  # seconds; a hung driver must not hang the caller
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Device:
    """One device that could run a model.

    index:         the number in `torch_device`, or in NVML's order for a GPU that torch cannot use
    kind:          "cuda" (NVIDIA), "rocm", "mps" or "cpu"
    capability:    compute capability of an NVIDIA GPU; None where unknown or not NVIDIA
    memory_bytes:  total memory (of a CPU, the RAM), 0 where unknown
    uuid:          "GPU-..." of an NVIDIA GPU
    bandwidth_gbs: theoretical memory bandwidth in 1e9 bytes/s, where NVML tells
    torch_device:  such as "cuda:0"; None when this torch cannot use the device
    hypothetical:  stands for hardware that is not here (a compute capability given by hand)
    """

    index: int
    name: str
    kind: Literal["cuda", "cpu", "rocm", "mps"]
    capability: Capability | None = None
    memory_bytes: int = 0
    uuid: str | None = None
    bandwidth_gbs: float | None = None
    torch_device: str | None = None
    hypothetical: bool = False

    def __str__(self) -> str:
        if self.kind != "cuda":
            return self.name
        if self.capability is None:
            return f"{self.name} (compute capability unknown)"
        return f"{self.name} (compute capability {show(self.capability)}: {series(self.capability)})"


def detect() -> list[Device]:
    """Every GPU that this process may use, in torch's order where torch sees it; [] when there is none.

    Honours CUDA_VISIBLE_DEVICES. NVML and torch number GPUs differently, so they are matched by UUID.
    """
    nvidia = _from_nvml() or _from_nvidia_smi()
    seen = _from_torch()
    if any(device.kind == "cuda" for device in seen):
        known = {_plain_uuid(device.uuid): device for device in nvidia if device.uuid}
        return [_merge(device, known.get(_plain_uuid(device.uuid))) for device in seen]
    return _visible(nvidia) + seen


def describe(device: Device | torch.device | str | int) -> Device:
    """The `Device` behind a torch device, its name or a GPU's number; ConfigError for an unknown one."""
    if isinstance(device, Device):
        return device
    try:
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}: use 'cpu', 'cuda', 'cuda:1' or 'mps'.") from None
    if wanted.type == "cpu":
        return _cpu()
    seen = [found for found in _from_torch() if str(found.torch_device).split(":")[0] == wanted.type]
    index = wanted.index if ":" in str(wanted) else _current_gpu()
    if wanted.type not in ("cuda", "mps") or index >= len(seen):
        names = " or ".join(["cpu", *(str(found.torch_device) for found in _from_torch())])
        raise ConfigError(f"torch {torch.__version__} has no device {str(wanted)!r} here: use {names}.")
    return seen[index]


def default_device() -> Device:
    """Where a model goes when nobody says: torch's current GPU, else the CPU."""
    seen = _from_torch()
    return seen[min(_current_gpu(), len(seen) - 1)] if seen else _cpu()


def refusal(device: Device) -> str | None:
    """What the device would need to run any kernel version; None when it can run some."""
    if device.kind != "cuda":
        return None
    if device.capability is None:
        return f"{device} would need a driver that tells its compute capability"
    if device.capability < MIN_CAPABILITY:
        return f"{device} would need {show(MIN_CAPABILITY)} ({series(MIN_CAPABILITY)}) or newer"
    if device.hypothetical or torch_has_code(device.capability):
        return None
    archs = ", ".join(_arch_list()) or "no GPU at all"
    return (
        f"{device} would need a torch with code for sm_{''.join(map(str, device.capability))} "
        f"(torch {torch.__version__} here has code for {archs})"
    )


def torch_has_code(capability: Capability) -> bool:
    """Whether the installed torch can run on a GPU of this capability.

    Binaries run on the same major and a minor at least theirs; PTX ("compute_90") on all that follows.
    A torch that names no architecture has no verdict on GPUs that every current build covers.
    """
    archs = _arch_list()
    return any(_runs(arch, capability) for arch in archs) if archs else capability >= OWN_KERNELS


def _runs(arch: str, capability: Capability) -> bool:
    built = known_capability(arch)
    if built is None:
        return False
    if arch.startswith("compute"):
        return built <= capability
    return built == capability if arch.endswith("a") else built[0] == capability[0] and built <= capability


def _arch_list() -> list[str]:
    try:
        return torch.cuda.get_arch_list()
    except (RuntimeError, AttributeError):
        return []


def driver_version() -> str:
    """The NVIDIA driver's, such as "580.65.06"; "unknown" where NVML does not tell."""
    return _text(_with_nvml(lambda nvml: nvml.nvmlSystemGetDriverVersion())) or "unknown"


def _from_nvml() -> list[Device]:
    found = _with_nvml(lambda nvml: [_nvml_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())])
    return [device for device in found or [] if device is not None]


def _with_nvml(ask: Callable[[Any], Any]) -> Any:
    """What `ask` finds through NVML; None where that fails."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except (ImportError, AttributeError, OSError):
        return None
    with suppress(nvml.NVMLError, AttributeError, OSError):
        nvml.nvmlInit()
        try:
            return ask(nvml)
        finally:
            nvml.nvmlShutdown()
    return None


def _nvml_device(nvml: Any, index: int) -> Device | None:
    """One GPU; a lost one must not hide the others, and a field that the driver lacks is left unknown."""

    def ask(name: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, name)(*arguments)
        except (nvml.NVMLError, AttributeError):
            return None

    handle = ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        return None
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    clock = ask("nvmlDeviceGetMaxClockInfo", handle, getattr(nvml, "NVML_CLOCK_MEM", 2))
    width = ask("nvmlDeviceGetMemoryBusWidth", handle)
    return Device(
        index=index,
        name=_text(ask("nvmlDeviceGetName", handle)) or "NVIDIA GPU",
        kind="cuda",
        capability=known_capability(tuple(capability or ())),
        memory_bytes=int(getattr(ask("nvmlDeviceGetMemoryInfo", handle), "total", 0) or 0),
        uuid=_text(ask("nvmlDeviceGetUUID", handle)) or None,
        # MHz x bits x 2 transfers a clock
        bandwidth_gbs=clock * 1e6 * width * 2 / 8 / 1e9 if clock and width else None,
    )


def _from_nvidia_smi() -> list[Device]:
    command = ["nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return []
    found = [_smi_device(line, number) for number, line in enumerate(done.stdout.strip().splitlines())]
    return [device for device in found if device is not None]


def _smi_device(line: str, number: int) -> Device | None:
    """A line of nvidia-smi; a field it cannot tell ("[N/A]") is unknown, a line that is no GPU is None."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) == 1 and (only := known_capability(parts[0])):
        return Device(number, "NVIDIA GPU", "cuda", only)
    if len(parts) < 5:
        return None
    index, *name, capability, memory, uuid = parts
    return Device(
        index=int(index) if index.isdigit() else number,
        name=", ".join(name),
        kind="cuda",
        capability=known_capability(capability),
        memory_bytes=_parse_memory(memory),
        uuid=uuid if uuid.startswith("GPU-") else None,
    )


def _from_torch() -> list[Device]:
    """The GPUs that torch itself can use: CUDA or ROCm, else Apple's."""
    if torch.cuda.is_available():
        return [_torch_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Device(0, "Apple GPU", "mps", memory_bytes=torch.mps.recommended_max_memory(), torch_device="mps")]
    return []


def _torch_gpu(index: int) -> Device:
    rocm = bool(getattr(torch.version, "hip", None))
    facts = torch.cuda.get_device_properties(index)
    uuid = str(getattr(facts, "uuid", "") or "")
    return Device(
        index=index,
        name=facts.name,
        kind="rocm" if rocm else "cuda",
        capability=None if rocm else (facts.major, facts.minor),
        memory_bytes=facts.total_memory,
        uuid=None if rocm or not uuid else f"GPU-{uuid.removeprefix('GPU-')}",
        torch_device=f"cuda:{index}",
    )


def _merge(seen: Device, nvml: Device | None) -> Device:
    """torch's number and capability, and what NVML knows beside them."""
    if nvml is None:
        return seen
    return replace(seen, memory_bytes=nvml.memory_bytes or seen.memory_bytes, bandwidth_gbs=nvml.bandwidth_gbs)


def _visible(gpus: list[Device]) -> list[Device]:
    """What CUDA_VISIBLE_DEVICES leaves, in its order; like CUDA, nothing counts after an unknown entry."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus
    chosen: list[Device] = []
    for entry in wanted.split(","):
        found = [gpu for gpu in gpus if _is_entry(gpu, entry.strip())]
        if not found:
            break
        chosen.append(found[0])
    return chosen


def _is_entry(gpu: Device, entry: str) -> bool:
    if entry.isdigit():
        return gpu.index == int(entry)
    return entry.startswith("GPU-") and (gpu.uuid or "").startswith(entry)


def _cpu() -> Device:
    name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return Device(0, name, "cpu", memory_bytes=_ram(), torch_device="cpu")


def _ram() -> int:
    """Bytes of physical memory, 0 where the system does not tell."""
    try:
        return max(0, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 0


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _parse_memory(text: str) -> int:
    found = re.fullmatch(r"(\d+) ?([KMG]iB)", text)
    return int(found[1]) * _UNITS[found[2]] if found else 0


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _plain_uuid(uuid: str | None) -> str | None:
    return uuid.removeprefix("GPU-").lower() if uuid else None
