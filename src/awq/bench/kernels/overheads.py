"""What surrounds the kernels: the CPU's part of a call, the first use of a model, and repacking its weights."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from awq.bench.kernels.shapes import Setting, find_shapes
from awq.bench.kernels.weights import random_linear
from awq.bench.timing import wall_seconds
from awq.errors import AwqError, KernelNotSupportedError
from awq.linear import QuantLinear

OPERATOR = "awq::linear"
_MODEL, _BLOCKS, _GROUP = "llama-2-7b", 32, 128
_BATCHES, _CALLS = 30, 200  # so few calls that the queue of launches never fills up
_PATIENCE_S = 300


def measure_overheads(device: torch.device) -> dict[str, Any]:
    """Microseconds of the CPU for a call, seconds of a cold and a warm first use, and the speed of repacking.

    KernelNotSupportedError where this package's CUDA kernels do not run on `device`.
    """
    if device.type != "cuda":
        raise KernelNotSupportedError(
            f"overheads are those of CUDA kernels, which {device} has not: use --device cuda."
        )
    with torch.cuda.device(device), torch.inference_mode():
        return {"call": call_overhead(device), "first_use": first_use(device), "repack": repacking(device)}


def call_overhead(device: torch.device) -> dict[str, float]:
    """Microseconds of the CPU to enqueue one row through the operator, and through an empty one with its signature."""
    setting = Setting(find_shapes([_MODEL])[1], _GROUP, torch.float16)
    linear = QuantLinear(random_linear(setting, device)[0])
    linear.prepare()
    x = torch.randn(1, setting.shape.in_features, device=device).half()
    call = recorded_call(linear, x)
    empty = empty_operator(call)
    microseconds = {
        "operator_us": _cpu_us(lambda: call.operator(*call.arguments, **call.keywords), device),
        "empty_us": _cpu_us(lambda: empty(*call.arguments, **call.keywords), device),
        "linear_us": _cpu_us(lambda: linear(x), device),
    }
    return microseconds | {"extra_us": microseconds["operator_us"] - microseconds["empty_us"]}


def first_use(device: torch.device) -> dict[str, Any]:
    """First use of a model's linears in a new process: with an empty cache of kernels, then with what that one left."""
    with tempfile.TemporaryDirectory() as cache:
        return {"cold": _first_use(cache, device), "warm": _first_use(cache, device)}


def repacking(device: torch.device) -> dict[str, float]:
    """GB/s of bytes read and written, the median over a model's linears, and the seconds of all its linears."""
    from awq.kernels.cuda.layout import to_units

    rates, seconds = [], 0.0
    for shape in find_shapes([_MODEL]):
        packed, _ = random_linear(Setting(shape, _GROUP, torch.float16), device)
        units = to_units(packed, None, device)

        def repack(packed: Any = packed) -> None:
            to_units(packed, None, device)
            torch.cuda.synchronize(device)

        taken = statistics.median(wall_seconds(repack, 5))
        rates.append((packed.nbytes + units.codes.nbytes + units.affine.nbytes) / taken / 1e9)
        seconds += _BLOCKS * taken
    return {"gbs": statistics.median(rates), f"{_MODEL}_s": seconds}


@dataclass
class Call:
    """A call of an operator as it reached the dispatcher."""

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Tensor


def recorded_call(linear: nn.Module, x: Tensor) -> Call:
    """The call of `OPERATOR` that `linear(x)` makes; AwqError where it makes none."""
    recorder = _Recorder()
    with recorder:
        linear(x)
    if recorder.call is None:
        raise AwqError(f"the linear did not call {OPERATOR}: its kernel is another than this package's CUDA one.")
    return recorder.call


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.call: Call | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == OPERATOR:
            self.call = Call(func, args, kwargs or {}, result)
        return result


def empty_operator(call: Call) -> Callable[..., Tensor]:
    """An operator with the arguments of `call` that allocates its result and does nothing."""
    shape, x = call.result.shape, call.result
    library = _libraries.setdefault("awq_bench", torch.library.Library("awq_bench", "FRAGMENT"))
    signature = str(call.operator._schema).partition("(")[2]
    name = f"empty_{len(_defined)}"
    library.define(f"{name}({signature}")
    library.impl(name, lambda *_, **__: x.new_empty(shape), x.device.type.upper())
    _defined.append(name)
    operator: Callable[..., Tensor] = getattr(torch.ops.awq_bench, name).default
    return operator


_libraries: dict[str, torch.library.Library] = {}  # an operator lives as long as its library
_defined: list[str] = []


def _cpu_us(call: Callable[[], object], device: torch.device) -> float:
    def batch() -> None:
        for _ in range(_CALLS):
            call()

    times = []
    for _ in range(_BATCHES):
        torch.cuda.synchronize(device)
        times += wall_seconds(batch, 1)
    return 1e6 * statistics.median(times) / _CALLS


def _first_use(cache: str, device: torch.device) -> dict[str, float]:
    command = [sys.executable, "-m", "awq.bench.kernels.first_use", str(device)]
    options: dict[str, Any] = {"env": os.environ | {"AWQ_CACHE": cache}, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=_PATIENCE_S, check=True, **options)
    except subprocess.SubprocessError as error:
        last = str(getattr(error, "stderr", None) or error).strip().splitlines()[-1]
        raise AwqError(f"using a model's linears in a new process failed: {last}") from error
    found: dict[str, float] = json.loads(done.stdout)
    return found
