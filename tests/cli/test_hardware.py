import os

import pytest

from awq import hardware
from awq.cli.output import format_bytes
from awq.hardware import Device
from awq.kernels import select_kernel_version
from tests.cli.run import run, run_json

OLD = Device(0, "GeForce GTX 960", "cuda", (5, 2), 4 * 2**30, "GPU-1")


def test_the_cpu_runs_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", list)
    (cpu,) = run_json("hardware")
    assert cpu["kind"] == "cpu"
    assert {verdict["version"] for verdict in cpu["versions"]} == {"GEMM", "GEMV"}
    for verdict in cpu["versions"]:
        choice = select_kernel_version(version=verdict["version"], device="cpu")
        assert verdict["available"]
        assert verdict["reason"] == f"by the kernel {choice.kernel!r}: {choice.how}"
    assert cpu["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 2**28


def test_a_gpu_that_is_too_old_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda: [OLD])
    gpu, cpu = run_json("hardware")
    assert gpu["capability"] == [5, 2]
    for verdict in gpu["versions"]:
        assert not verdict["available"]
        assert "GTX 960" in verdict["reason"]
    assert all(verdict["available"] for verdict in cpu["versions"])


def test_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda: [OLD])
    shown = run("hardware")
    assert shown.exit_code == 0
    assert "not available" in shown.stdout
    assert "4.29 GB" in shown.stdout
    assert format_bytes(hardware.describe("cpu").memory_bytes) in shown.stdout
    assert "as asked" not in shown.stdout


def test_a_system_that_does_not_tell_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    assert hardware.describe("cpu").memory_bytes == 0
