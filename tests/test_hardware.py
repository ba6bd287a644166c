"""Simulated devices: NVML, nvidia-smi and torch are replaced, so that every case runs without a GPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awq import hardware
from awq.capability import series
from awq.errors import ConfigError
from awq.hardware import (
    Device,
    default_device,
    describe,
    detect,
    driver_version,
    parse_capability,
    refusal,
    torch_has_code,
)

RTX_3090 = {"name": "NVIDIA GeForce RTX 3090", "capability": (8, 6), "memory": 24 << 30, "uuid": "GPU-aaaa-1"}
GTX_1080 = {"name": b"NVIDIA GeForce GTX 1080", "capability": (6, 1), "memory": 8 << 30, "uuid": b"GPU-bbbb-2"}
H200 = {"name": "NVIDIA H200", "capability": (9, 0), "memory": 141 << 30, "uuid": "GPU-cccc-3"}


class FakeNvml(SimpleNamespace):
    """The part of pynvml that is used, over a list of dictionaries; a missing entry raises NVMLError."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: list[dict[str, Any]], broken: bool = False) -> None:
        super().__init__(gpus=gpus, broken=broken)

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver/library version mismatch")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if self.gpus[index].get("lost"):
            raise self.NVMLError("GPU is lost")
        return self.gpus[index]

    def _field(self, handle: dict[str, Any], key: str) -> Any:
        if key not in handle:
            raise self.NVMLError("Not Supported")
        return handle[key]

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> Any:
        return self._field(handle, "name")

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> Any:
        return self._field(handle, "capability")

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:
        return SimpleNamespace(total=self._field(handle, "memory"))

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> Any:
        return self._field(handle, "uuid")

    def nvmlDeviceGetMaxClockInfo(self, handle: dict[str, Any], kind: int) -> Any:
        return self._field(handle, "clock")

    def nvmlDeviceGetMemoryBusWidth(self, handle: dict[str, Any]) -> Any:
        return self._field(handle, "width")


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No NVML, no nvidia-smi, no GPU in torch, until a test says otherwise."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    simulate_smi(monkeypatch, error=FileNotFoundError("nvidia-smi"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def simulate_nvml(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any], broken: bool = False) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(list(gpus), broken))


def simulate_smi(monkeypatch: pytest.MonkeyPatch, text: str = "", error: Exception | None = None) -> None:
    def run(command: list[str], **_options: Any) -> Any:
        assert command[0] == "nvidia-smi"
        if error:
            raise error
        return SimpleNamespace(stdout=text)

    monkeypatch.setattr(hardware.subprocess, "run", run)


def simulate_torch(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any], archs: tuple[str, ...] = ("sm_80",)) -> None:
    def properties(index: int) -> Any:
        gpu = gpus[index]
        major, minor = gpu["capability"]
        uuid = gpu["uuid"].removeprefix("GPU-") if "uuid" in gpu else None
        return SimpleNamespace(name=gpu["name"], major=major, minor=minor, total_memory=gpu["memory"], uuid=uuid)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((8, 6), (8, 6)),
        ([7, 5], (7, 5)),
        ("8.6", (8, 6)),
        (" 12.0 ", (12, 0)),
        (8.6, (8, 6)),
        (12.1, (12, 1)),
        ("sm_86", (8, 6)),
        ("sm_120", (12, 0)),
        ("SM90a", (9, 0)),
        ("compute_90", (9, 0)),
        (86, (8, 6)),
        ("75", (7, 5)),
        (120, (12, 0)),
        (8, (8, 0)),
        (12, (12, 0)),
    ],
)
def test_a_capability_in_any_spelling(value: object, expected: tuple[int, int]) -> None:
    assert parse_capability(value) == expected


@pytest.mark.parametrize(
    "value",
    ["", "RTX 3090", "8.6.1", "[N/A]", "-8.6", (8,), (8, 6, 0), ("8", "6"), (8, 10), (0, 3), True, 8.65, None, "nan"],
)
def test_a_value_that_is_no_capability(value: object) -> None:
    with pytest.raises(ConfigError, match="compute capability"):
        parse_capability(value)


@pytest.mark.parametrize(
    ("capability", "word"),
    [
        ((3, 5), "Kepler"),
        ((5, 2), "GTX 900"),
        ((6, 1), "GTX 1000"),
        ((7, 2), "Volta"),
        ((7, 5), "RTX 20"),
        ((8, 0), "A100"),
        ((8, 6), "RTX 30"),
        ((8, 9), "RTX 40"),
        ((9, 0), "Hopper"),
        ((10, 3), "Blackwell"),
        ((12, 0), "RTX 50"),
        ((14, 2), "newer"),
    ],
)
def test_the_series_that_a_capability_means(capability: tuple[int, int], word: str) -> None:
    assert word in series(capability)


def test_a_machine_without_a_gpu() -> None:
    assert detect() == []
    assert default_device().kind == "cpu"


def test_nvml_finds_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_nvml(monkeypatch, {**RTX_3090, "clock": 9751, "width": 384}, GTX_1080)
    first, second = detect()
    assert (first.name, first.capability, first.memory_bytes) == ("NVIDIA GeForce RTX 3090", (8, 6), 24 << 30)
    assert first.bandwidth_gbs == pytest.approx(936.1, abs=0.1)
    assert (second.name, second.uuid, second.bandwidth_gbs) == ("NVIDIA GeForce GTX 1080", "GPU-bbbb-2", None)
    assert first.torch_device is None


def test_the_version_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver_version() == "unknown"
    simulate_nvml(monkeypatch)
    assert driver_version() == "580.65.06"
    simulate_nvml(monkeypatch, broken=True)
    assert driver_version() == "unknown"


def test_a_lost_gpu_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_nvml(monkeypatch, {"lost": True}, RTX_3090, {"name": "NVIDIA GB10", "capability": (12, 1)})
    assert [(gpu.index, gpu.memory_bytes) for gpu in detect()] == [(1, 24 << 30), (2, 0)]


def test_nvidia_smi_where_nvml_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_nvml(monkeypatch, RTX_3090, broken=True)
    simulate_smi(
        monkeypatch,
        "0, NVIDIA GeForce RTX 2080 Ti, 7.5, 11264 MiB, GPU-1\n"
        "1, Odd, Name, [N/A], [N/A], [N/A]\n"
        "Unable to determine the device handle for GPU 0000:02:00.0: Unknown Error\n",
    )
    good, odd = detect()
    assert (good.index, good.capability, good.memory_bytes, good.uuid) == (0, (7, 5), 11264 << 20, "GPU-1")
    assert (odd.name, odd.capability, odd.memory_bytes, odd.uuid) == ("Odd, Name", None, 0, None)


def test_nvidia_smi_that_prints_the_capability_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_smi(monkeypatch, "8.9\n8.6\n")
    assert [(gpu.index, gpu.capability) for gpu in detect()] == [(0, (8, 9)), (1, (8, 6))]


@pytest.mark.parametrize(
    "text", ["", "\n\n", "No devices were found\n", "NVIDIA-SMI has failed, sorry", "\x00\x01,,,,"]
)
def test_garbage_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    simulate_smi(monkeypatch, text)
    assert all(gpu.capability is None for gpu in detect())


@pytest.mark.parametrize(
    "error",
    [
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 10),
        PermissionError("nvidia-smi"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ],
)
def test_nvidia_smi_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    simulate_smi(monkeypatch, error=error)
    assert detect() == []


def test_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_torch(monkeypatch, H200)
    (gpu,) = detect()
    assert (gpu.kind, gpu.capability, gpu.memory_bytes, gpu.torch_device) == ("cuda", (9, 0), 141 << 30, "cuda:0")


def test_torch_and_nvml_are_matched_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees two of three GPUs, in another order: numbers are torch's, and each keeps its own facts."""
    simulate_nvml(
        monkeypatch, {**RTX_3090, "clock": 9751, "width": 384}, GTX_1080, {**H200, "clock": 3201, "width": 6144}
    )
    simulate_torch(monkeypatch, H200, RTX_3090)
    first, second = detect()
    assert (first.index, first.name, first.torch_device) == (0, "NVIDIA H200", "cuda:0")
    assert first.bandwidth_gbs == pytest.approx(4916.7, abs=0.1)
    assert (second.index, second.name, second.torch_device) == (1, "NVIDIA GeForce RTX 3090", "cuda:1")
    assert second.bandwidth_gbs == pytest.approx(936.1, abs=0.1)


def test_a_gpu_that_nvml_does_not_know_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a slice of a GPU (MIG): torch's facts stand."""
    simulate_nvml(monkeypatch, H200)
    simulate_torch(monkeypatch, {**H200, "memory": 16 << 30, "uuid": "slice"})
    assert [(gpu.memory_bytes, gpu.bandwidth_gbs) for gpu in detect()] == [(16 << 30, None)]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("1,0", ["GeForce GTX 1080", "GeForce RTX 3090"]),
        ("GPU-bbbb", ["GeForce GTX 1080"]),
        ("0,7,1", ["GeForce RTX 3090"]),
        ("-1", []),
        ("", []),
    ],
)
def test_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch, wanted: str, names: list[str]) -> None:
    simulate_nvml(monkeypatch, RTX_3090, GTX_1080)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wanted)
    assert [gpu.name.removeprefix("NVIDIA ") for gpu in detect()] == names


def test_rocm_is_seen_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_torch(monkeypatch, {"name": "AMD Instinct MI300X", "capability": (9, 4), "memory": 192 << 30})
    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
    (gpu,) = detect()
    assert (gpu.kind, gpu.capability, gpu.torch_device) == ("rocm", None, "cuda:0")
    assert refusal(gpu) is None


def test_apple_gpu_is_seen_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 << 30)
    (gpu,) = detect()
    assert (gpu.kind, gpu.torch_device, gpu.memory_bytes) == ("mps", "mps", 16 << 30)
    assert describe("mps") == default_device() == gpu
    with pytest.raises(ConfigError, match="no device 'cuda'"):
        describe("cuda")


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_torch(monkeypatch, RTX_3090, H200)
    assert describe("cuda").name == "NVIDIA GeForce RTX 3090"
    assert describe(1) == describe("cuda:1") == describe(torch.device("cuda", 1)) == detect()[1]
    assert describe(detect()[1]) == detect()[1]
    assert describe("cpu").kind == "cpu"
    assert default_device() == detect()[0]


@pytest.mark.parametrize("device", ["cuda:2", "mps", "xpu", 5])
def test_describe_a_device_that_is_not_here(monkeypatch: pytest.MonkeyPatch, device: str | int) -> None:
    simulate_torch(monkeypatch, RTX_3090, H200)
    with pytest.raises(ConfigError, match=r"use cpu or cuda:0 or cuda:1\.$"):
        describe(device)


def test_describe_a_word_that_is_no_device() -> None:
    with pytest.raises(ConfigError, match="unknown device 'gpu0'"):
        describe("gpu0")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_75", "sm_80", "sm_90"], (6, 1), False),
        (["sm_75", "sm_80", "sm_90"], (7, 0), False),
        (["sm_60", "sm_70"], (6, 1), True),
        (["sm_60", "sm_70"], (7, 2), True),
        (["sm_60", "sm_70"], (7, 5), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
        (["sm_90"], (12, 0), False),
        (["sm_100a"], (10, 3), False),
        (["sm_100a"], (10, 0), True),
        (["gfx942"], (9, 4), False),
        ([], (8, 6), True),
        ([], (6, 1), False),
    ],
)
def test_what_torch_was_built_for(
    monkeypatch: pytest.MonkeyPatch, archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: archs)
    assert torch_has_code(capability) is runs


def test_an_arch_list_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[str]:
        raise AttributeError("_cuda_getArchFlags")

    monkeypatch.setattr(torch.cuda, "get_arch_list", fail)
    assert torch_has_code((8, 6))


def test_mixed_gpus_are_judged_each_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_nvml(monkeypatch, RTX_3090, GTX_1080, {**H200, "name": "Tesla K80", "capability": (3, 7)})
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    fine, pascal, kepler = (refusal(gpu) for gpu in detect())
    assert fine is None
    assert pascal is not None and all(part in pascal for part in ("GTX 1080", "6.1", "sm_61", "sm_75, sm_80"))
    assert kepler is not None and all(part in kepler for part in ("Tesla K80", "3.7", "Kepler", "6.0"))


def test_hardware_that_is_not_here_is_judged_by_its_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    assert refusal(Device(0, "a GPU", "cuda", (6, 1), hypothetical=True)) is None
    assert "driver" in (refusal(Device(0, "Odd", "cuda", None)) or "")
