"""The operator around the CUDA kernels, which the CPU plays here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.errors import AwqError
from awq.kernels.cuda import op
from awq.linear import QuantLinear
from tests.kernels.cuda.stub import Call, prepared, stub_kernels
from tests.kernels.plain import plain, random_outliers, random_packed

BIAS = torch.linspace(-1, 1, 40)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    torch.manual_seed(0)
    with stub_kernels(monkeypatch) as noted:
        yield noted


def layer(*, bias: bool = False, outliers: int = 0, in_features: int = 96, version: str | None = None) -> QuantLinear:
    packed = random_packed(40, in_features, 32 if in_features % 32 == 0 else -1)
    kept = random_outliers(packed, outliers) if outliers else None
    return prepared(QuantLinear(packed, BIAS.half() if bias else None, kept), version)


def arguments(linear: QuantLinear, gemv_rows: int = 8) -> tuple[Any, ...]:
    buffers = linear._buffers
    tensors = [buffers.get(name) for name in ("cuda_codes", "cuda_affine", "cuda_kept", "cuda_index", "bias")]
    return (*tensors, linear.in_features, linear.out_features, 32, gemv_rows)


def relative(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_shape_and_dtype(calls: list[Call], dtype: torch.dtype, bias: bool, outliers: int) -> None:
    packed = random_packed(40, 96, 32)
    linear = layer(bias=bias, outliers=outliers)
    for shape in ((96,), (1, 96), (2, 3, 96), (70, 96), (2, 1, 30, 96)):
        x = torch.randn(shape).to(dtype)
        y = linear(x)
        true = plain(x.reshape(-1, 96), packed, random_outliers(packed, outliers) if outliers else None)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 40) and y.is_contiguous()
        assert relative(y.reshape(-1, 40), true + BIAS.half() if bias else true) < 2**-7
    if bias:
        assert {call.bias for call in calls} == {dtype if dtype.itemsize == 2 else None}


def test_float32_is_computed_in_the_dtype_that_the_layer_expects(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = layer(bias=True)
    linear.spec = linear.spec.__class__(96, 40, 32, torch.bfloat16)
    assert linear(torch.randn(2, 96)).dtype == torch.float32
    assert calls[0].dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_values_neither_overflow_nor_vanish(calls: list[Call], dtype: torch.dtype, bias: bool) -> None:
    """Rows of very different size, results beyond float16 among them."""
    linear = layer(bias=bias, outliers=3)
    huge = 1e140 if dtype == torch.float64 else 1e37
    size = torch.tensor([1e-30, 1e-7, 1.0, 60000.0, 1e6, huge, 0.0, 1e-40], dtype=dtype).unsqueeze(1)
    x = torch.randn(8, 96, dtype=dtype).clamp(-1, 1) * size
    packed = random_packed(40, 96, 32)
    y, true = linear(x), plain(x, packed, random_outliers(packed, 3)) + (BIAS.half() if bias else 0)
    assert y.dtype == dtype and y.isfinite().all() and calls[0].dtype == torch.float16
    for row, wanted in zip(y[:6], true[:6], strict=True):
        assert relative(row, wanted) < 1e-3
    assert torch.equal(y[6], BIAS.half().to(dtype) if bias else torch.zeros(40, dtype=dtype))
    x[0, 0] = float("nan")
    assert linear(x)[0].isnan().all() and linear(x)[1:].isfinite().all()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, [("GEMV", 1), ("GEMV", 8), ("GEMM", 9), ("GEMM", 20)]),
        ("GEMM", [("GEMM", 1), ("GEMM", 8), ("GEMM", 9), ("GEMM", 20)]),
        ("GEMV", [("GEMV", 1), *[("GEMV", 8)] * 2, ("GEMV", 1), *[("GEMV", 8)] * 2, ("GEMV", 4)]),
    ],
)
def test_the_version_goes_by_rows_unless_it_is_pinned(
    calls: list[Call], version: str | None, expected: list[tuple[str, int]]
) -> None:
    linear = layer(version=version)
    for rows in (1, 8, 9, 20):
        x = torch.randn(rows, 96).half()
        assert relative(linear(x), plain(x, random_packed(40, 96, 32))) < 2e-3
    assert [(call.version, call.rows) for call in calls] == expected


def test_fewer_rows_a_launch_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    with stub_kernels(monkeypatch, launch_rows=3) as calls:
        layer()(torch.randn(7, 96).half())
    assert [(call.version, call.rows) for call in calls] == [("GEMV", 3), ("GEMV", 3), ("GEMV", 1)]


def test_strided_rows_are_taken_as_they_lie(calls: list[Call]) -> None:
    linear = layer()
    wide = torch.randn(6, 208).half()
    for x in (wide[:, :96], wide[::2, 8:104], wide[:, 112:], wide[2:3, :96], wide[0, 8:104]):
        y = linear(x)
        assert calls[-1].address == x.data_ptr() and calls[-1].stride[0] in (208, 416, 96)
        assert torch.equal(y, linear(x.contiguous().clone()))


def test_what_a_kernel_cannot_read_is_copied(calls: list[Call]) -> None:
    linear = layer()
    wide, odd = torch.randn(96, 200).half(), torch.randn(5, 97).half()
    for x in (
        wide[:5, ::2][:, :96],  # elements apart
        wide.t()[:5],
        wide[:5, 1:97],  # not at a multiple of 16 bytes
        odd[:, :96],  # rows not a multiple of 8 elements apart
        wide[:1, :96].expand(5, 96),  # rows on top of each other
        torch.randn(97).half()[1:],  # contiguous, but not aligned
        wide[:4, :96].reshape(2, 2, 96).transpose(0, 1),
    ):
        y = linear(x)
        assert calls[-1].address % 16 == 0 and calls[-1].stride == (96, 1)
        assert torch.equal(y, linear(x.clone(memory_format=torch.contiguous_format)))


def test_rows_too_far_apart_for_a_kernel_are_copied(calls: list[Call]) -> None:
    x = torch.randn(96).half()
    for stride, copied in ((2**31 - 8, False), (2**31, True)):
        y = layer()(x.as_strided((1, 96), (stride, 1)))
        assert (calls[-1].address != x.data_ptr()) is copied and calls[-1].stride[0] == (96 if copied else stride)
        assert torch.equal(y, layer()(x.view(1, 96)))


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of torch by torch, as it traces it
def test_the_gradient_of_x(calls: list[Call], dtype: torch.dtype, outliers: int) -> None:
    linear, packed = layer(bias=True, outliers=outliers), random_packed(40, 96, 32)
    weight = packed.dequantize()
    if outliers:
        weight = random_outliers(packed, outliers).add_to(weight)
    x, grad = torch.randn(2, 5, 96).to(dtype).requires_grad_(), torch.randn(2, 5, 40).to(dtype)
    y = linear(x)
    assert y.requires_grad and torch.equal(y, linear(x.detach()))
    y.backward(grad)
    assert x.grad is not None and x.grad.dtype == dtype
    assert relative(x.grad, grad.double() @ weight.double()) < 1e-2
    with torch.no_grad():
        assert not linear(x).requires_grad
    torch._dynamo.reset()
    eager, x.grad = x.grad, None
    torch.compile(linear, fullgraph=True, backend="aot_eager")(x).backward(grad)
    assert torch.equal(x.grad, eager)


def test_a_width_that_is_no_multiple_of_8(calls: list[Call]) -> None:
    x = torch.randn(3, 100).half()
    assert relative(layer(in_features=100)(x), plain(x, random_packed(40, 100, -1))) < 2e-3
    assert calls[-1].stride == (104, 1)
    wide = torch.full((3, 104), float("nan")).half()
    wide[:, :100] = x  # aligned, but a kernel that reads whole 16 bytes would see what lies between the rows
    assert torch.equal(layer(in_features=100)(wide[:, :100]), layer(in_features=100)(x))
    assert calls[-2].address != wide.data_ptr()


def test_no_rows(calls: list[Call]) -> None:
    for shape in ((0, 96), (2, 0, 96)):
        y = layer(bias=True)(torch.randn(shape).half())
        assert y.shape == (*shape[:-1], 40) and y.dtype == torch.float16
    assert not calls


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 95).half(), r"shape \[2, 95\].* \[\.\.\., 96\]"),
        (torch.zeros(2, 48).half(), r"shape \[2, 48\]"),
        (torch.zeros(2, 96, dtype=torch.int32), "x is int32.* cast it to bfloat16 or float16"),
    ],
)
def test_a_wrong_x(calls: list[Call], x: Tensor, words: str) -> None:
    with pytest.raises(AwqError, match=words):
        layer()(x)
    assert not calls


def test_an_x_on_another_device() -> None:
    class Elsewhere(Tensor):
        device = torch.device("cuda", 1)

    x = torch.zeros(2, 96).half().as_subclass(Elsewhere)
    assert (
        op._complaint(x, torch.zeros(1), 96) == "x is on cuda:1 and the weight on cpu: move one of them to the other."
    )


def test_bfloat16_needs_newer_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, count in (((7, 5), 1), ((8, 0), 2), ((12, 0), 2)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        op._dtypes.cache_clear()
        assert len(op._dtypes(0)) == count
    op._dtypes.cache_clear()


def test_what_tracing_needs_to_know() -> None:
    meta = {"device": "meta"}
    units = torch.empty(3, 1, 2048, dtype=torch.uint8, **meta), torch.empty(3, 1, 320, dtype=torch.uint8, **meta)
    for shape in ((96,), (0, 96), (2, 3, 96)):
        for dtype in (torch.float16, torch.bfloat16):
            x = torch.empty(shape, dtype=dtype, **meta)
            y = op.linear(x, *units, None, None, None, 96, 40, 32, 8)
            assert y.shape == (*shape[:-1], 40) and y.dtype == dtype and y.is_meta


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("rows", [0, 1, 20])
def test_it_is_an_operator_as_torch_wants_them(calls: list[Call], rows: int, outliers: int) -> None:
    linear = layer(bias=True, outliers=outliers)
    torch.library.opcheck(op.linear, (torch.randn(2, rows, 96).half(), *arguments(linear)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_into_one_graph(calls: list[Call], dynamic: bool, dtype: torch.dtype) -> None:
    """With dynamic rows the choice of version stays inside of the operator: one graph for all."""
    linear = layer(bias=True, outliers=3)
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(linear, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (2, 20, 33):
        x = torch.randn(2, rows, 96).to(dtype)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 1)
        assert torch.equal(compiled(x), linear(x))
    assert len(graphs) == 1 or not dynamic
    assert [call.version for call in calls[::2]] == ["GEMV", "GEMM", "GEMM"]


def test_functional_tracing_keeps_the_operator(calls: list[Call]) -> None:
    linear = layer(bias=True)
    torch._dynamo.reset()
    x = torch.randn(3, 96).half()
    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))
