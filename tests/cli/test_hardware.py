import pytest

from awq import hardware
from awq.hardware import Device
from tests.cli.run import run, run_json

OLD = Device(0, "GeForce GTX 960", "cuda", (5, 2), 4 * 2**30, "GPU-1")


def test_the_cpu_runs_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", list)
    (cpu,) = run_json("hardware")
    assert cpu["kind"] == "cpu"
    assert {verdict["version"] for verdict in cpu["versions"]} == {"GEMM", "GEMV"}
    assert all(verdict["available"] and verdict["reason"] for verdict in cpu["versions"])


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
