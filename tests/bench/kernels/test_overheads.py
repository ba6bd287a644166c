import json
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.bench.kernels import overheads
from awq.errors import AwqError, KernelNotSupportedError

CPU = torch.device("cpu")
LIBRARY = torch.library.Library("awq_test_overheads", "FRAGMENT")
LIBRARY.define("scale(Tensor x, Tensor? other, int factor=3) -> Tensor")
LIBRARY.impl("scale", lambda x, other, factor=3: torch.cat([x, x], -1) * factor, "CPU")


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.awq_test_overheads.scale(x + 1, None, factor=2)
        return y


def test_an_empty_operator_has_the_same_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overheads, "OPERATOR", "awq_test_overheads::scale")
    call = overheads.recorded_call(Scale(), torch.ones(2, 4))
    assert torch.equal(call.arguments[0], torch.full((2, 4), 2.0))
    for _ in range(2):
        empty = overheads.empty_operator(call)
        y = empty(*call.arguments, **call.keywords)
        assert y.shape == (2, 8)
        with pytest.raises(RuntimeError):
            empty(1, 2, 3, 4)


def test_a_linear_that_calls_another_operator() -> None:
    with pytest.raises(AwqError, match="did not call awq::linear"):
        overheads.recorded_call(nn.Linear(4, 4), torch.ones(1, 4))


def test_overheads_need_a_gpu() -> None:
    with pytest.raises(KernelNotSupportedError, match="cpu"):
        overheads.measure_overheads(CPU)


def test_first_use_is_cold_then_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    caches, devices = [], set()

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        caches.append(options["env"]["AWQ_CACHE"])
        devices.add(command[-1])
        return subprocess.CompletedProcess(command, 0, json.dumps({"first_s": 3 / len(caches)}), "")

    monkeypatch.setattr(subprocess, "run", run)
    assert overheads.first_use(torch.device("cuda", 1)) == {"cold": {"first_s": 3}, "warm": {"first_s": 1.5}}
    assert caches[0] == caches[1] and devices == {"cuda:1"}


def test_a_failing_process_is_told() -> None:
    """There is no GPU to use here, or no such cache folder."""
    if torch.cuda.is_available():
        pytest.skip("it does not fail here")
    with pytest.raises(AwqError, match=r"new process failed: \w"):
        overheads.first_use(torch.device("cuda"))


@pytest.mark.gpu
def test_overheads_of_a_gpu() -> None:
    found = overheads.measure_overheads(torch.device("cuda", 0))
    assert 0 < found["call"]["empty_us"] < found["call"]["operator_us"]
    assert found["first_use"]["warm"]["first_s"] > 0
    assert found["repack"]["gbs"] > 1
