from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq import kernels
from awq.errors import AwqError, ConfigError, KernelNotSupportedError
from awq.kernels import KERNELS, LinearSpec
from awq.kernels.portable import Portable
from awq.linear import QuantLinear
from tests.kernels.plain import plain, random_outliers, random_packed

BIAS = torch.linspace(-1, 1, 40)


def layer(*, bias: bool = False, outliers: int = 0, group_size: int = 32) -> QuantLinear:
    packed = random_packed(40, 96, group_size)
    return QuantLinear(packed, BIAS.half() if bias else None, random_outliers(packed, outliers) if outliers else None)


def expected(linear: QuantLinear, x: Tensor) -> Tensor:
    y = plain(x.reshape(-1, 96), linear.packed, linear.outliers)
    y = y if linear.bias is None else y + BIAS.half()
    return y.view(*x.shape[:-1], 40)


def relative(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("outliers", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", [None, *(kernel.name for kernel in KERNELS)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forward(kernel: str | None, dtype: torch.dtype, bias: bool, outliers: int) -> None:
    linear = layer(bias=bias, outliers=outliers)
    if kernel:
        _prepare(linear, kernel=kernel, keep_packed=True)
    for shape in ((96,), (1, 96), (2, 3, 96), (70, 96), (2, 1, 30, 96)):
        x = torch.randn(shape).to(dtype)
        y = linear(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], 40)
        assert relative(y, expected(linear, x)) < (
            1e-2 if kernel in ("cpu", "portable") else 2**-7 if dtype != torch.float32 else 1e-6
        )


@pytest.mark.parametrize("version", [None, "GEMV", "GEMM"])
def test_no_rows(version: str | None) -> None:
    linear = layer(bias=True, outliers=2)
    for shape in ((0, 96), (2, 0, 96), (0, 5, 96)):
        assert linear(torch.randn(shape)).shape == (*shape[:-1], 40)
    linear.prepare(version)
    y = linear(torch.randn(3, 0, 96, dtype=torch.bfloat16))
    assert y.shape == (3, 0, 40) and y.dtype == torch.bfloat16


def test_strided_input() -> None:
    linear = layer(bias=True, outliers=2)
    linear.prepare()
    wide = torch.randn(4, 6, 200)
    for x in (
        wide[..., :96],
        wide.transpose(0, 1)[..., 3:195:2],
        wide[:, ::2, 50:146],
        wide[:1, :1, :96].expand(3, 5, 96),
    ):
        assert torch.equal(linear(x), linear(x.contiguous()))


def test_input_is_left_alone() -> None:
    linear = layer(bias=True, outliers=2)
    x = torch.randn(3, 96, dtype=torch.bfloat16)
    before = x.clone()
    for prepare in (None, "cpu", "portable"):
        if prepare:
            _prepare(linear, kernel=prepare, keep_packed=True)
        linear(x)
        assert torch.equal(x, before)


def test_an_input_of_the_wrong_width() -> None:
    linear = layer()
    _prepare(linear, kernel="cpu")
    for width in (48, 95, 192):
        with pytest.raises(RuntimeError, match=r"shape '\["):
            linear(torch.randn(4, width))


class Recorder(Portable):
    """Notes the version of each call."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def gemv_rows(self, spec: LinearSpec, device: Any, weights: Any = None) -> int:
        return 5

    def multiply(self, x: Tensor, weights: Any, spec: LinearSpec, version: str) -> Tensor:
        self.calls.append(version)
        return super().multiply(x, weights, spec, version)


@pytest.mark.parametrize(
    ("version", "called"),
    [
        (None, ["GEMV", "GEMV", "GEMM"]),
        ("auto", ["GEMV", "GEMV", "GEMM"]),
        ("gemm", ["GEMM"] * 3),
        ("GEMV", ["GEMV"] * 3),
        ("marlin", ["GEMM"] * 3),
    ],
)
def test_the_version_goes_by_rows_unless_it_is_pinned(
    monkeypatch: pytest.MonkeyPatch, version: str | None, called: list[str]
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(kernels, "KERNELS", (recorder,))
    linear = layer()
    linear.prepare(version)
    for shape in ((1, 96), (5, 1, 96), (2, 3, 96)):
        linear(torch.randn(shape))
    assert recorder.calls == called


def test_prepare_releases_the_packed_weight() -> None:
    linear = layer(outliers=2)
    choice = _prepare(linear, kernel="cpu")
    assert choice is linear.choice and choice.kernel.name == "cpu"
    for action in (lambda: linear.packed, lambda: linear.outliers, linear.prepare):
        with pytest.raises(AwqError, match="keep_packed=True"):
            action()


def test_prepare_may_keep_the_packed_weight() -> None:
    linear = layer(outliers=2)
    before = linear.packed, linear.outliers
    _prepare(linear, kernel="cpu", keep_packed=True)
    assert linear.packed == before[0] and linear.outliers == before[1]
    assert linear.prepare(kernel="reference").kernel.name == "reference"
    x = torch.randn(2, 96)
    assert relative(linear(x), expected(linear, x)) < 1e-6


def test_a_preparation_that_fails_leaves_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Portable):
        name = "failing"

        def prepare(self, *arguments: Any) -> dict[str, Tensor]:
            return {"failing_weight": torch.zeros(1)}

        def gemv_rows(self, spec: LinearSpec, device: Any, weights: Any = None) -> int:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(kernels, "KERNELS", (Failing(),))
    linear, x = layer(bias=True, outliers=2), torch.randn(3, 96)
    y, names = linear(x), set(linear.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        linear.prepare(dtype=torch.bfloat16)
    assert torch.equal(linear(x), y) and set(linear.state_dict()) == names
    assert linear.choice is kernels.UNPREPARED and linear.spec.dtype == torch.float16


def test_prepare_with_wrong_words() -> None:
    linear = layer()
    for arguments in ({"version": "GEMX"}, {"kernel": "triton"}):
        with pytest.raises(ConfigError):
            linear.prepare(**arguments)
    linear = layer(group_size=16)
    with pytest.raises(KernelNotSupportedError, match="16"):
        linear.prepare(kernel="cpu")
    assert linear.prepare().kernel.name == "portable"


def test_attributes() -> None:
    linear = layer(bias=True, outliers=3)
    assert (linear.in_features, linear.out_features, linear.group_size) == (96, 40, 32)
    assert linear.weight_dtype == torch.float16
    assert linear.outliers is not None and linear.outliers.index.dtype == torch.int32
    assert layer().outliers is None
    assert layer(group_size=-1).group_size == 96
    assert "outliers=3, kernel=reference, version=auto" in repr(linear)
    linear.prepare("gemv", kernel="portable")
    assert "bias=True" in repr(linear) and "kernel=portable, version=GEMV" in repr(linear)


def test_state_dict_has_the_names_of_the_checkpoint() -> None:
    assert set(layer().state_dict()) == {"qweight", "qzeros", "scales"}
    assert set(layer(bias=True, outliers=1).state_dict()) == {
        *("qweight", "qzeros", "scales", "bias"),
        *("outlier_index", "outlier_residual"),
    }


@pytest.mark.parametrize("kernel", [None, "cpu", "portable"])
def test_state_dict_round_trip(kernel: str | None) -> None:
    first, second = (
        layer(bias=True, outliers=2),
        QuantLinear(random_packed(40, 96, 32, seed=9), BIAS, layer(outliers=2).outliers),
    )
    for linear in (first, second) if kernel else ():
        _prepare(linear, kernel=kernel)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 96)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("kernel", [None, "cpu", "portable"])
def test_deepcopy(kernel: str | None) -> None:
    linear = layer(bias=True, outliers=2)
    if kernel:
        _prepare(linear, kernel=kernel)
    twin = copy.deepcopy(linear)
    x = torch.randn(3, 96)
    y = linear(x)
    assert torch.equal(twin(x), y)
    for buffer in linear.buffers():
        buffer.zero_()
    assert torch.equal(twin(x), y)


@pytest.mark.parametrize("kernel", [None, "cpu", "portable"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_the_model_leaves_the_weight(kernel: str | None, cast: str) -> None:
    linear = layer(bias=True, outliers=2)
    if kernel:
        _prepare(linear, kernel=kernel)
    before = {name: tensor.clone() for name, tensor in linear.named_buffers()}
    model = nn.Sequential(linear, nn.Linear(40, 8))
    getattr(model, cast)()
    dtype = model[1].weight.dtype
    for name, tensor in linear.named_buffers():
        assert tensor.dtype == (dtype if name == "bias" else before[name].dtype), name
        if name != "bias":
            assert torch.equal(tensor, before[name])
    assert model(torch.randn(2, 96, dtype=dtype)).dtype == dtype


def test_a_bias_of_another_dtype() -> None:
    linear = layer(bias=True)
    for kernel in (None, "cpu"):
        if kernel:
            _prepare(linear, kernel=kernel, keep_packed=True)
        for dtype in (torch.bfloat16, torch.float32):
            assert linear(torch.randn(2, 96, dtype=dtype)).dtype == dtype


def _prepare(linear: QuantLinear, **arguments: Any) -> kernels.Choice:
    try:
        return linear.prepare(**arguments)
    except KernelNotSupportedError as error:
        pytest.skip(str(error))
