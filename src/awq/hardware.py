"""What GPU is this: name, compute capability, memory, and whether kernels can run on it.

NVIDIA GPUs are found through NVML, else `nvidia-smi`, else torch; ROCm and Apple GPUs through torch.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from awq.errors import ConfigError

Capability = tuple[int, int]
Kind = Literal["cuda", "cpu", "rocm", "mps"]

# Below MIN_CAPABILITY nothing runs. From there to OWN_KERNELS torch's own operators do the work,
# where the installed torch has code for the GPU.
MIN_CAPABILITY: Capability = (6, 0)
OWN_KERNELS: Capability = (7, 5)

# First compute capability of each series, ascending: users mix these up, so messages name both.
SERIES: tuple[tuple[Capability, str], ...] = (
    ((1, 0), "Tesla"),
    ((2, 0), "Fermi, GeForce GTX 400 and 500"),
    ((3, 0), "Kepler, GeForce GTX 600 and 700, Tesla K"),
    ((5, 0), "Maxwell, GeForce GTX 900, Tesla M"),
    ((6, 0), "Pascal, GeForce GTX 1000, Tesla P"),
    ((7, 0), "Volta, V100"),
    ((7, 5), "Turing, GeForce RTX 20 and GTX 16, T4"),
    ((8, 0), "Ampere, A100"),
    ((8, 6), "Ampere, GeForce RTX 30, A10"),
    ((8, 7), "Ampere, Jetson Orin"),
    ((8, 9), "Ada, GeForce RTX 40, L4"),
    ((9, 0), "Hopper, H100 and H200"),
    ((10, 0), "Blackwell, B200 and B300"),
    ((11, 0), "Blackwell, Jetson Thor"),
    ((12, 0), "Blackwell, GeForce RTX 50"),
    ((13, 0), "newer than this package"),
)

_SMI_FIELDS = "index,name,compute_cap,memory.total,uuid"
_SMI_TIMEOUT = 10  # seconds; a hung driver must not hang the caller
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Device:
    """One device that could run a model.

    index:         the number in `torch_device`, or in NVML's order for a GPU that torch cannot use
    kind:          "cuda" (NVIDIA), "rocm", "mps" or "cpu"
    capability:    compute capability of an NVIDIA GPU; None where unknown or not NVIDIA
    memory_bytes:  total memory, 0 where unknown
    uuid:          "GPU-..." of an NVIDIA GPU
    bandwidth_gbs: theoretical memory bandwidth in 1e9 bytes/s, where NVML tells
    torch_device:  such as "cuda:0"; None when this torch cannot use the device
    hypothetical:  stands for hardware that is not here (a compute capability given by hand)
    """

    index: int
    name: str
    kind: Kind
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


def show(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def series(capability: Capability) -> str:
    """The architecture and the names on the box: (8, 6) is "Ampere, GeForce RTX 30, A10"."""
    return [name for first, name in SERIES if first <= capability][-1]


def parse_capability(value: object) -> Capability:
    """(8, 6) for (8, 6), "8.6", 8.6, "sm_86", "86" or 86; ConfigError for anything else."""
    parsed = _capability_pair(value) if isinstance(value, (tuple, list)) else _capability_text(value)
    if parsed is None or not (1 <= parsed[0] <= 99 and 0 <= parsed[1] <= 9):
        raise ConfigError(f"{value!r} is no compute capability: write it as (8, 6) or '8.6'.")
    return parsed


def _capability_pair(value: tuple[Any, ...] | list[Any]) -> Capability | None:
    if len(value) == 2 and all(isinstance(part, int) and not isinstance(part, bool) for part in value):
        return value[0], value[1]
    return None


def _capability_text(value: object) -> Capability | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    text = str(value).strip().lower()
    if found := re.fullmatch(r"(\d+)\.(\d)", text):
        return int(found[1]), int(found[2])
    if found := re.fullmatch(r"(?:sm_?|compute_?)(\d+)(\d)[af]?", text):
        return int(found[1]), int(found[2])
    if re.fullmatch(r"\d{1,3}", text):  # 86 is 8.6 and 120 is 12.0, but 8 and 12 are major numbers
        number = int(text)
        return divmod(number, 10) if number >= 20 else (number, 0)
    return None


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
    index = _current_gpu() if wanted.index is None else wanted.index
    if wanted.type not in ("cuda", "mps") or index >= len(seen):
        raise ConfigError(f"torch {torch.__version__} has no device {str(wanted)!r} here: it has {_names()}.")
    return seen[index]


def default_device() -> Device:
    """Where a model goes when nobody says: torch's current GPU, else the CPU."""
    seen = _from_torch()
    return seen[min(_current_gpu(), len(seen) - 1)] if seen else _cpu()


def refusal(device: Device) -> str | None:
    """Why no kernel version can run on the device and what that would need; None when some can."""
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
        f"{device} would need a torch with code for sm_{''.join(map(str, device.capability))}: "
        f"torch {torch.__version__} here has code for {archs}"
    )


def torch_has_code(capability: Capability) -> bool:
    """Whether the installed torch can run on a GPU of this capability.

    Binaries run on the same major and a minor at least theirs; PTX ("compute_90") on all that follows.
    A torch that names no architecture has no verdict on GPUs that every current build covers.
    """
    archs = _arch_list()
    if not archs:
        return capability >= OWN_KERNELS
    return any(_runs(arch, capability) for arch in archs)


def _runs(arch: str, capability: Capability) -> bool:
    try:
        built = parse_capability(arch)
    except ConfigError:
        return False
    if arch.startswith("compute"):
        return built <= capability
    return built == capability if arch.endswith("a") else built[0] == capability[0] and built <= capability


def _arch_list() -> list[str]:
    try:
        return torch.cuda.get_arch_list()
    except (RuntimeError, AttributeError):
        return []


def _from_nvml() -> list[Device]:
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except (ImportError, AttributeError, OSError):
        return []
    except nvml.NVMLError:
        return []
    try:
        found = [_nvml_device(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()
    return [device for device in found if device is not None]


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
        capability=_known_capability(tuple(capability or ())),
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
    if len(parts) == 1 and (only := _known_capability(parts[0])):
        return Device(number, "NVIDIA GPU", "cuda", only)
    if len(parts) < 5:
        return None
    index, *name, capability, memory, uuid = parts
    return Device(
        index=int(index) if index.isdigit() else number,
        name=", ".join(name),
        kind="cuda",
        capability=_known_capability(capability),
        memory_bytes=_parse_memory(memory),
        uuid=uuid if uuid.startswith("GPU-") else None,
    )


def _from_torch() -> list[Device]:
    """The GPUs that torch itself can use: CUDA or ROCm, else Apple's."""
    if torch.cuda.is_available():
        return [_torch_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return [Device(0, "Apple GPU", "mps", memory_bytes=_mps_memory(), torch_device="mps")]
    return []


def _torch_gpu(index: int) -> Device:
    rocm = torch.version.hip is not None
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
    return Device(0, f"CPU ({torch.backends.cpu.get_cpu_capability()})", "cpu", torch_device="cpu")


def _current_gpu() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _names() -> str:
    return ", ".join(["cpu", *(str(found.torch_device) for found in _from_torch())])


def _mps_memory() -> int:
    return torch.mps.recommended_max_memory()


def _known_capability(value: object) -> Capability | None:
    try:
        return parse_capability(value)
    except ConfigError:
        return None


def _parse_memory(text: str) -> int:
    found = re.fullmatch(r"(\d+) ?([KMG]iB)", text)
    return int(found[1]) * _UNITS[found[2]] if found else 0


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _plain_uuid(uuid: str | None) -> str | None:
    return uuid.removeprefix("GPU-").lower() if uuid else None
