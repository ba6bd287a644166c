"""A `QuantLinear` that moves between devices: repacked, chosen for again, or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from awq import kernels
from awq.errors import AwqError
from awq.hardware import Device
from awq.kernels import LinearSpec
from awq.kernels.portable import Portable
from awq.linear import QuantLinear
from tests.test_linear import _prepare, expected, layer, relative


@pytest.mark.parametrize("kernel", ["cpu", "portable"])
def test_moving_within_a_kind_of_device_needs_no_packed_weight(kernel: str) -> None:
    linear = layer(outliers=2)
    _prepare(linear, kernel=kernel)
    x = torch.randn(3, 96)
    y = linear(x)
    linear.to("cpu", torch.float16).share_memory()
    assert torch.equal(linear(x), y)
    linear.to("meta")
    assert all(buffer.is_meta for buffer in linear.buffers())


def test_moving_to_another_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout belongs to its kernel: elsewhere the weight is repacked from what was kept, or the move is refused."""
    released, kept, raw = layer(outliers=2), layer(outliers=2), layer(outliers=2)
    _prepare(released, kernel="cpu")
    _prepare(kept, keep_packed=True, version="GEMV")
    # A GPU that is not here: the move itself goes from the CPU to the CPU.
    monkeypatch.setattr(QuantLinear, "_target", lambda self, fn: torch.device("cuda"))
    monkeypatch.setattr(kernels, "describe", lambda device: Device(0, "a GPU", "cuda", (6, 1), hypothetical=True))
    with pytest.raises(AwqError, match="load the checkpoint again"):
        released.to("cpu")
    kept.to("cpu")
    assert (kept.choice.kernel.name, kept.choice.version) == ("portable", "GEMV")
    assert raw.to("cpu").choice is kernels.UNPREPARED
    x = torch.randn(3, 96)
    assert relative(kept(x), expected(raw, x)) < 1e-6


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda linear: pickle.loads(pickle.dumps(linear))])
def test_a_copy_of_an_unprepared_layer_moves(monkeypatch: pytest.MonkeyPatch, twin: Callable[[Any], Any]) -> None:
    linear = twin(layer(outliers=2))
    monkeypatch.setattr(QuantLinear, "_target", lambda self, fn: torch.device("cuda"))
    x = torch.randn(3, 96)
    assert relative(linear.to("cpu")(x), expected(linear, x)) < 1e-6


class Gpus(Portable):
    """A kernel of GPUs of a layout of its own, which one of them rejects and whose versions cross elsewhere on each."""

    name = "gpus"

    def rejects(self, spec: LinearSpec, device: Device) -> str | None:
        return "it does not run there" if device.capability == (6, 1) else None

    def gemv_rows(self, spec: LinearSpec, device: Any, weights: Any = None) -> int:
        return 3

    def prepare(self, *arguments: Any) -> dict[str, Tensor]:
        return {f"gpus_{name}": tensor for name, tensor in super().prepare(*arguments).items()}

    def multiply(self, x: Tensor, weights: Any, spec: LinearSpec, version: str) -> Tensor:
        own = {name.removeprefix("gpus_"): tensor for name, tensor in weights.items() if name.startswith("gpus_")}
        return super().multiply(x, own, spec, version)


@pytest.mark.parametrize("keep_packed", [False, True])
def test_moving_to_another_gpu_chooses_again(monkeypatch: pytest.MonkeyPatch, keep_packed: bool) -> None:
    """The move itself goes from the CPU to the CPU, whose name stands for a GPU's."""
    place = Device(0, "a GPU", "cuda", (9, 0), hypothetical=True)
    monkeypatch.setattr(kernels, "KERNELS", (Gpus(), Portable()))
    monkeypatch.setattr(kernels, "describe", lambda device: place)
    monkeypatch.setattr(QuantLinear, "_target", lambda self, fn: torch.device("cpu", 1))
    linear, raw, x = layer(outliers=2), layer(outliers=2), torch.randn(3, 96)
    linear.prepare(keep_packed=keep_packed)
    y, linear._gemv_rows = linear(x), 1
    place = Device(1, "another GPU", "cuda", (8, 0), hypothetical=True)
    assert torch.equal(linear.to("cpu")(x), y)
    assert (linear.choice.kernel.name, linear._gemv_rows) == ("gpus", 3)
    place = Device(2, "an old GPU", "cuda", (6, 1), hypothetical=True)
    if keep_packed:
        assert linear.to("cpu").choice.kernel.name == "portable"
    else:
        with pytest.raises(AwqError, match="load the checkpoint again"):
            linear.to("cpu")
    assert relative(linear(x), expected(raw, x)) < 1e-6


@pytest.mark.gpu
def test_on_a_gpu_and_back() -> None:
    linear = layer(bias=True, outliers=2)
    x = torch.randn(3, 96)
    true = expected(linear, x)
    linear.prepare(keep_packed=True)
    for device in ("cuda", "cpu"):
        linear.to(device)
        assert linear.choice.kernel.name in ("cuda", "cpu", "portable")
        assert (linear.choice.kernel.name == "cuda") is (
            device == "cuda" and torch.cuda.get_device_capability() >= (7, 5)
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            y = linear(x.to(device, dtype))
            assert y.device.type == device and y.dtype == dtype
            assert relative(y.cpu(), true) < 1e-2
