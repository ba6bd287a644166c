"""The CUDA kernels against the reference in float32, over shapes, dtypes, groups and values as they come."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.algorithm.search.affine import fit_affine
from awq.cli.demo import find_embedded_model
from awq.data.calibration import evaluation_text
from awq.errors import MissingDependencyError
from awq.kernels.cuda import backend, gemm, gemv, op
from awq.kernels.cuda.layout import Shape, effective_group, to_units, units_to_dense
from awq.packing import Outliers, PackedInt4, pack
from awq.pretrained.source import find_source
from tests.gpu.on_gpu import GPU, LIMIT, VERSIONS, dtypes, launch, packed_on_gpu, reference
from tests.kernels.plain import random_outliers, random_packed

pytestmark = pytest.mark.gpu

ROWS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129)
# out_features x in_features and a group: few and many tiles and units, and all that is no power of two.
SHAPES = [
    (8, 32, 32),
    (8, 100, -1),
    (24, 96, -1),
    (24, 64, 64),
    (16, 128, 128),
    (40, 352, 32),
    (72, 576, 64),
    (136, 320, -1),
    (200, 896, 128),
    (264, 1280, 256),
    (520, 1504, 32),
    (1000, 2240, 64),
    (2056, 640, 128),
    (1536, 4864, -1),
    (4096, 2048, 128),
    (640, 11008, 32),
    (304, 28672, 64),
    (12296, 512, 128),
    (40008, 224, 32),
]


@pytest.fixture(scope="module", autouse=True)
def _compiled_side_by_side() -> None:
    for dtype, (n, k, group_size), kept in itertools.product(dtypes(), SHAPES, (0, 1)):
        shape = Shape(k, n, effective_group(group_size, k) or 128, kept, dtype is torch.bfloat16)
        backend._prefetch(torch.cuda.get_device_capability(), shape)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """cuBLAS at its best, to be measured against."""
    torch.manual_seed(0)
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def terms(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The norm that a row of y has but for chance: the root of the sum of its squared terms."""
    squares = (x.float().square() @ weight.square().t()).sum(1)
    return (squares if bias is None else squares + bias.float().square().sum()).sqrt()


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_against_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    combinations = [(True, 0, False), (False, 0, True), (True, 1, True), (True, 5, False), (False, 21, True)]
    for zero_point, kept, with_bias in combinations:
        packed = packed_on_gpu(shape, zero_point)
        outliers = random_outliers(packed, min(kept, packed.in_features)).to(GPU) if kept else None
        bias = torch.randn(packed.out_features, device=GPU).to(dtype) if with_bias else None
        units, weight = to_units(packed, outliers, GPU), packed.dequantize()
        weight = weight if outliers is None else outliers.add_to(weight)
        x = torch.randn(sum(ROWS), packed.in_features, device=GPU).to(dtype)
        x = op._aligned(x) if packed.in_features % 8 else x
        true, scale = reference(x, packed, outliers, bias), terms(x, weight, bias)
        for version in VERSIONS:
            parts = [launch(version, part, units, bias) for part in x.split(ROWS)]
            triples = zip(parts, true.split(ROWS), scale.split(ROWS), strict=True)
            errors = [
                (y.float() - exact).norm() / torch.maximum(exact.norm(), norm.norm()) for y, exact, norm in triples
            ]
            worst = torch.stack(errors).nan_to_num(nan=9.0)
            assert worst.max() <= LIMIT[dtype], f"{version} of {ROWS[int(worst.argmax())]} rows, {zero_point=}, {kept=}"


@pytest.mark.parametrize(
    ("version", "shape", "rows", "kept"),
    [
        ("GEMV", (1536, 4864, -1), 7, 21),
        ("GEMV", (1536, 4864, -1), 7, 0),
        ("GEMV", (4096, 11008, 128), 6, 110),
        ("GEMV", (4096, 4096, 128), 1, 41),
        ("GEMV", (4096, 4096, 64), 4, 41),
        ("GEMM", (4096, 4096, 128), 8, 41),
        ("GEMM", (4096, 11008, 32), 16, 110),
        ("GEMM", (4096, 4096, 128), 40, 41),
    ],
)
def test_the_same_bits_back_to_back(version: str, shape: tuple[int, int, int], rows: int, kept: int) -> None:
    """Launches that overlap, two blocks of them on a multiprocessor: rings are refilled while others are still read."""
    packed = packed_on_gpu(shape, True)
    units = to_units(packed, random_outliers(packed, kept).to(GPU) if kept else None, GPU)
    x = torch.randn(rows, shape[1], device=GPU).half()
    alone = launch(version, x, units)
    outputs, graph = torch.empty(48, rows, shape[0], dtype=x.dtype, device=GPU), torch.cuda.CUDAGraph()
    multiply = gemm.gemm if version == "GEMM" else gemv.gemv
    with torch.cuda.graph(graph):
        for y in outputs:
            multiply(x, units, None, y)
    for _ in range(50):
        outputs.fill_(float("nan"))
        graph.replay()
        assert torch.equal(outputs, alone.expand_as(outputs))


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
def test_repacked_on_the_gpu_as_by_torch(group: int) -> None:
    """Bit for bit, padding too."""
    for out_features, width in ((8, 256), (40, 768), (200, 1280), (24, 1024)):
        packed = random_packed(out_features, width, group)
        outliers = random_outliers(packed, 19)
        here, there = to_units(packed, outliers, GPU), to_units(packed, outliers, "cpu")
        for name in ("codes", "affine", "kept", "index"):
            assert torch.equal(getattr(here, name).cpu(), getattr(there, name)), name
        assert torch.equal(units_to_dense(there), packed.dequantize())


def with_zero_channels(packed: PackedInt4, channels: list[int]) -> PackedInt4:
    """The weights of some input channels made exactly zero: their codes are the zero points."""
    codes, zeros = packed.codes(), packed.zeros()
    for channel in channels:
        codes[:, channel] = zeros[:, channel // packed.group_size]
    return pack(codes, zeros, packed.scales.t())


def no_worse_than_cublas(x: Tensor, packed: PackedInt4, outliers: Outliers | None = None) -> None:
    """Per row at most twice the error of cuBLAS on the dequantized weights in x's dtype."""
    weight = packed.dequantize()
    weight = weight if outliers is None else outliers.add_to(weight)
    true = x.double() @ weight.double().t()
    theirs = (torch.nn.functional.linear(x, weight.to(x.dtype)).double() - true).norm(dim=1)
    units = to_units(packed, outliers, GPU)
    for version, rows in itertools.product(VERSIONS, (1, 3, 8, 16, 40, len(x))):
        errors = (launch(version, x[:rows], units).double() - true[:rows]).norm(dim=1)
        worst = (errors / theirs[:rows]).nan_to_num(nan=99.0).max()
        assert worst <= 2, f"{version} of {rows} rows: {worst:.2f} times the error of cuBLAS"


@pytest.mark.parametrize("kept", ["none", "the huge", "others"])
@pytest.mark.parametrize("silent", [False, True], ids=["", "zero weights"])
@pytest.mark.parametrize("channels", [[70], [3, 70, 71, 900], list(range(5, 2048, 64))], ids=len)
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", dtypes())
def test_channels_1000_times_the_rest(
    dtype: torch.dtype, group: int, channels: list[int], silent: bool, kept: str
) -> None:
    """As real models have. With weights of zero there, what is left is the error of the others."""
    packed = packed_on_gpu((768, 2048, group), True)
    packed = with_zero_channels(packed, channels) if silent else packed
    outliers = None
    if kept != "none":
        index = torch.tensor(channels if kept == "the huge" else [1, 500, 2000], dtype=torch.int32, device=GPU)
        size = 0.0 if silent else 0.01
        outliers = Outliers(index, (size * torch.randn(len(index), 768, device=GPU)).half())
    x = torch.randn(130, 2048, device=GPU)
    x[:, channels] *= 1000
    no_worse_than_cublas(x.to(dtype), packed, outliers)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("dtype", dtypes())
def test_rows_of_any_size(dtype: torch.dtype, zero_point: bool) -> None:
    """Each row has its own scale: tiny ones beside large ones, and rows of zeros."""
    packed = packed_on_gpu((768, 2048, 128), zero_point)
    sizes = torch.logspace(-3, 1.5, 130, device=GPU).unsqueeze(1)
    x = (torch.randn(130, 2048, device=GPU) * sizes[torch.randperm(130)]).to(dtype)
    no_worse_than_cublas(x, packed)
    for version in VERSIONS:
        assert not launch(version, torch.zeros_like(x[:9]), to_units(packed, None, GPU)).any()


@pytest.fixture(scope="module")
def captured() -> list[tuple[str, Tensor, Tensor]]:
    """Name, inputs and weight of linears of SmolLM2-135M that have very different inputs."""
    try:
        source = find_source(find_embedded_model())
    except MissingDependencyError as error:
        pytest.skip(str(error))
    model, tokenizer = source.load(torch.float32), source.tokenizer()
    found: list[tuple[str, Tensor, Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: torch.nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.append((name, inputs[0][0].float().to(GPU), module.weight.detach().float().to(GPU)))

        return hook

    for name, module in model.named_modules():
        if ".layers.2" in name and name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):
            module.register_forward_hook(note(name))
    ids = tokenizer(evaluation_text(), return_tensors="pt")["input_ids"][:, :160]
    with torch.no_grad():
        model(ids)
    return found


@pytest.mark.parametrize("group", [32, 64, -1])
@pytest.mark.parametrize("dtype", dtypes())
def test_activations_of_a_real_model(
    captured: list[tuple[str, Tensor, Tensor]], dtype: torch.dtype, group: int
) -> None:
    assert captured
    for _, x, weight in captured:
        grid = fit_affine(weight, group, 4, zero_point=True)
        no_worse_than_cublas(x.to(dtype), pack(grid.encode(weight), grid.zeros, grid.scales))


@pytest.mark.parametrize("kept", [0, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", dtypes())
def test_a_bad_row_spoils_itself_alone(dtype: torch.dtype, value: float, kept: int) -> None:
    packed = packed_on_gpu((264, 1280, 128), True)
    outliers = random_outliers(packed, kept).to(GPU) if kept else None
    units = to_units(packed, outliers, GPU)
    for version, rows in itertools.product(VERSIONS, (1, 4, 8, 16, 33, 64, 128, 300)):
        x = torch.randn(rows, 1280, device=GPU).to(dtype)
        good, bad = launch(version, x, units), rows // 2
        for column in {1279, 5, *([int(outliers.index[0])] if outliers else [])}:
            spoilt = x.clone()
            spoilt[bad, column] = value
            y = launch(version, spoilt, units)
            others = torch.arange(rows, device=GPU) != bad
            assert not y[bad].isfinite().any()
            assert torch.equal(y[others], good[others])


@pytest.mark.parametrize("shape", [(264, 1280, 128), (4096, 2048, 128), (640, 11008, 32)], ids=str)
def test_the_same_bits_on_every_run(shape: tuple[int, int, int]) -> None:
    packed = packed_on_gpu(shape, True)
    units = to_units(packed, random_outliers(packed, 9).to(GPU), GPU)
    for version, rows in itertools.product(VERSIONS, (1, 2, 7, 16, 33, 64, 200, 1000)):
        x = torch.randn(rows, packed.in_features, device=GPU).half()
        first = launch(version, x, units)
        for _ in range(5):
            assert torch.equal(launch(version, x, units), first)
