"""What a GEMM launch is given: every field of its parameters where the source has it, from caches or not."""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from awq import jit
from awq.kernels.cuda import dense, gemm, op, workspace
from awq.kernels.cuda.layout import SOURCES, Gpu, Shape, Units, to_units
from awq.kernels.cuda.schedule import plan
from tests.kernels.plain import CPU, random_outliers, random_packed

STREAM = 0x7000_0000_1000
POINTERS = ("code_bytes", "affine_bytes", "kept", "kept_index", "x_values", "y", "bias", "partial", "flags")


class Launch(NamedTuple):
    kernel: str
    grid: int
    block: int
    pdl: bool
    params: bytes


class Machine:
    """A GPU of an architecture that keeps what it was asked to launch."""

    def __init__(self, arch: str) -> None:
        self.arch, self.launches, self.maps = arch, [], []

    def kernel(self, source: Any, name: str, arch: str, defines: Any = None) -> Any:
        assert arch == self.arch and (SOURCES / source).is_file()
        return Kernel(self, name)

    def tensor_map(self, *arguments: Any) -> bytes:
        self.maps.append(arguments)
        return len(self.maps).to_bytes(1, "little") * 128

    def of(self, name: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel == name]


class Kernel:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def clusters(self, size: int, block: int, shared: int) -> int:
        return 132 // size

    def launcher(self, grid: int, block: int, shared: int, size: int, pdl: bool = False) -> Any:
        return Launcher(self, grid, block, size, pdl)


class Launcher:
    def __init__(self, kernel: Kernel, grid: int, block: int, size: int, pdl: bool) -> None:
        self.lock, self.params = threading.Lock(), memoryview(bytearray(size))
        self.made, self.machine = (kernel.name, grid, block, pdl), kernel.machine

    def __call__(self, stream: int) -> None:
        assert stream == STREAM and self.lock.locked()
        self.machine.launches.append(Launch(*self.made, bytes(self.params)))


def forget() -> None:
    for cache in (gemm._launch, gemm._rows_map, gemm._weight, dense._launcher):
        cache.cache_clear()
    workspace._places.clear()


@pytest.fixture(params=["sm_90a", "sm_86"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(request.param)
    monkeypatch.setattr(jit, "kernel", made.kernel)
    monkeypatch.setattr(jit, "tensor_map", made.tensor_map)
    for module in (gemm, dense):
        monkeypatch.setattr(module, "gpu", lambda device: Gpu(made.arch, 132, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)  # with which torch.cuda.stream does nothing
    monkeypatch.setattr(workspace, "_device", lambda index: CPU)
    forget()
    yield made
    forget()


def fields() -> dict[str, int]:
    """Field -> offset, from the comments of struct Params."""
    text = (SOURCES / "gemm_common.cuh").read_text(encoding="utf-8")
    body = text[text.index("struct Params {") : text.index("};", text.index("struct Params {"))]
    found: dict[str, int] = {}
    for names, offset in re.findall(r"^\s+(?:const )?\w+\*? ([\w, ]+);\s+// (\d+)", body, re.M):
        for i, name in enumerate(names.split(", ")):
            found[name] = int(offset) + 4 * i
    return found


FIELDS = fields()


def value(launch: Launch, name: str) -> int:
    size = 8 if name in POINTERS else 4
    return int.from_bytes(launch.params[FIELDS[name] : FIELDS[name] + size], "little")


def read(launch: Launch) -> tuple[memoryview, memoryview]:
    """Its parameters as pointers and as numbers."""
    return memoryview(launch.params).cast("Q"), memoryview(launch.params).cast("i")


def weight(n: int, k: int, kept: int = 0) -> Units:
    packed = random_packed(n, k, 32)
    return to_units(packed, random_outliers(packed, kept) if kept else None, CPU)


def at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("rows", [3, 40, 200, 600])
def test_every_field_is_where_the_kernel_reads_it(machine: Machine, rows: int, kept: int) -> None:
    units, x = weight(264, 544, kept), torch.empty(rows, 560).half()[:, :544]
    bias, y = torch.empty(264).half() if kept else None, torch.empty(rows, 264).half()
    gemm.gemm(x, units, bias, y)
    shape = Shape(544, 264, 32, -(-kept // 16), False)
    p = plan(rows, shape, machine.arch, 132)
    if machine.arch == "sm_86" and rows == 600:
        pytest.skip("dequantized")
    (launch,) = machine.of(p.design.kernel)
    assert (launch.grid, launch.block, launch.pdl) == (p.blocks, p.design.threads, machine.arch == "sm_90a")
    assert len(launch.params) == 768 and max(FIELDS.values()) + 4 <= 768
    pointers = {"code_bytes": units.codes, "affine_bytes": units.affine, "kept": units.kept, "kept_index": units.index}
    for name, tensor in (pointers | {"x_values": x, "y": y, "bias": bias}).items():
        assert value(launch, name) == at(tensor), name
    numbers = {"x_stride": 560, "rows": rows, "in_features": 544, "out_features": 264}
    numbers |= {
        "token_tiles": p.token_tiles,
        "row_blocks": p.row_blocks,
        "workers": p.workers,
        "steps": p.steps,
        "walk": p.walk,
    }
    numbers |= {"whole_tiles": p.whole, "share": p.share, "longer": p.longer}
    numbers |= {"kept_steps": shape.kept_steps, "kept_room": p.kept_room}
    assert {name: value(launch, name) for name in numbers} == numbers
    assert set(FIELDS) == {*POINTERS, *numbers, "x", "codes", "affine", "out", "gathered"}
    assert (value(launch, "partial") != 0) is p.splits


@pytest.mark.parametrize("rows", [3, 40, 600])
def test_tensor_maps_where_there_are_tensor_copies(machine: Machine, rows: int) -> None:
    units, x, y = weight(264, 544, 20), torch.empty(rows, 544).half(), torch.empty(rows, 264).half()
    gemm.gemm(x, units, None, y)
    if machine.arch == "sm_86":
        assert machine.maps == []
        return
    design = plan(rows, Shape(544, 264, 32, 2, False), machine.arch, 132).design
    launch = machine.of(design.kernel)[0]
    described = {
        name: machine.maps[launch.params[FIELDS[name]] - 1]
        for name in ("x", "out", "gathered", "codes", "affine")
        if launch.params[FIELDS[name]]
    }
    box = (64, design.tokens // design.cluster)
    assert described["x"] == (x.data_ptr(), "float16", (544, rows), (1088,), box, 128, 128)
    strides = (3 * 2048, 3 * 320)  # of a tile's three units
    tiles = design.block_rows // 16
    boxes = ((64 * design.slices, tiles), (40, tiles))
    for name, tensor, stride, extent in zip(("codes", "affine"), units[:2], strides, boxes, strict=True):
        assert described[name][:5] == (tensor.data_ptr(), "uint64", (stride // 8, 17), (stride,), extent)
    assert ("gathered" in described) is not design.mma
    assert ("out" in described) is design.tensor_store


def test_a_second_call_describes_nothing_again(machine: Machine) -> None:
    x, y = torch.empty(40, 544).half(), torch.empty(40, 264).half()
    one, other = weight(264, 544), weight(264, 544)
    for units in (one, other, one, other):
        gemm.gemm(x, units, None, y)
    assert len(machine.maps) == (0 if machine.arch == "sm_86" else 1 + 2 * 2)
    codes = [value(launch, "code_bytes") for launch in machine.launches]
    assert codes == [at(one.codes), at(other.codes)] * 2
    assert machine.launches[0] == machine.launches[2]


def test_kept_channels_are_gathered_for_wgmma(machine: Machine) -> None:
    units, x = weight(264, 544, 5), torch.empty(40, 544).half()
    gemm.gemm(x, units, None, torch.empty(40, 264).half())
    assert [launch.kernel for launch in machine.launches] == (
        ["gather", "gemm_wgmma"] if machine.arch == "sm_90a" else ["gemm_mma"]
    )
    if machine.arch == "sm_90a":
        pointers, numbers = read(machine.launches[0])
        assert (pointers[0], pointers[1]) == (at(x), at(units.index))
        assert numbers[6:9].tolist() == [40, 16, 544]


def test_launched_one_after_the_other_where_asked(machine: Machine) -> None:
    x, y, units = torch.empty(40, 544).half(), torch.empty(40, 264).half(), weight(264, 544)
    with jit.programmatic(False):
        gemm.gemm(x, units, None, y)
    assert not machine.launches[0].pdl


@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_without_wgmma_go_to_torch(machine: Machine, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    if machine.arch == "sm_90a":
        pytest.skip("it has wgmma")
    packed = random_packed(24, 352, 32)
    outliers = random_outliers(packed, 5)
    true = outliers.add_to(packed.dequantize())
    units, x = to_units(packed, outliers, CPU), torch.randn(600, 352).half().requires_grad_()
    b, y = torch.randn(24).half() if bias else None, torch.empty(600, 24).half()
    monkeypatch.setattr(dense, "dequantize", lambda given, dtype: true.to(dtype))
    gemm.gemm(x, units, b, y)
    wanted = x.detach().float() @ true.t() + (0 if b is None else b.float())
    assert not machine.launches and not y.requires_grad
    assert (y.float() - wanted).norm() / wanted.norm() < 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("error")
def test_any_shape_goes_to_torch(machine: Machine, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    packed = random_packed(24, 352, 32)
    true = packed.dequantize()
    units, x, b = to_units(packed, None, CPU), torch.randn(2, 300, 352).half(), torch.randn(24).half() if bias else None
    with monkeypatch.context() as patch:
        patch.setattr(gemm, "_launch", lambda *arguments: gemm._Launch())
        patch.setattr(dense, "dequantize", lambda given, dtype: true.to(dtype))
        patch.setattr(op, "_dtypes", lambda index: {torch.float16})
        patch.setattr(op, "_current_device", lambda: -1)
        y = op.launch(x, units.codes, units.affine, None, None, b, 352, 24, 32, 8)
    wanted = x.float() @ true.t() + (0 if b is None else b.float())
    assert y.shape == (2, 300, 24) and (y.float() - wanted).norm() / wanted.norm() < 1e-3


def test_what_the_dequantizing_kernel_is_given(machine: Machine) -> None:
    units = to_units(random_packed(40, 100, -1), None, CPU)
    machine.arch = "sm_86"
    dequantized = dense.dequantize(units, torch.float16)
    assert dequantized.shape == (40, 100) and dequantized.stride() == (104, 1)
    (launch,) = machine.launches
    assert (launch.kernel, launch.grid, launch.block) == ("dequantize", 3, 128)
    pointers, numbers = read(launch)
    assert pointers[:5].tolist() == [at(units.codes), at(units.affine), 0, 0, at(dequantized)]
    assert numbers[10:14].tolist() == [40, 104, 1, 0]


def test_a_workspace_is_held_until_its_kernel_is_enqueued(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may put a larger one into its place meanwhile."""
    held: list[bool] = []
    memories: list[weakref.ref[Tensor]] = []
    real, launch = workspace.workspace, Launcher.__call__

    def replaced(device: int, stream: int, size: int) -> workspace.Place:
        place = real(device, stream, size)
        assert place.memory is not None
        memories.append(weakref.ref(place.memory))
        workspace._places.clear()
        return place

    def called(self: Launcher, stream: int) -> None:
        held.extend(memory() is not None for memory in memories)
        launch(self, stream)

    monkeypatch.setattr(gemm, "workspace", replaced)
    monkeypatch.setattr(Launcher, "__call__", called)
    gemm.gemm(torch.empty(40, 544).half(), weight(264, 544), None, torch.empty(40, 264).half())
    assert held == [True] and memories[0]() is None
