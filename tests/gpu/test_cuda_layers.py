"""Layers and models on the CUDA kernels: graphs, compilation, streams, threads, devices and memory."""

from __future__ import annotations

import itertools
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.errors import AwqError
from awq.kernels.base import EVERY_ROW
from awq.kernels.cuda import crossover
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from tests.gpu.on_gpu import GPU, LIMIT, VERSIONS, dtypes, packed_on_gpu, reference, relative
from tests.kernels.plain import random_outliers, random_packed
from tests.tiny import byte_tokenizer, random_tokens, tiny_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same version in every run of these tests."""
    monkeypatch.setenv("AWQ_CROSSOVER", "8")
    torch.manual_seed(0)


def layer(
    shape: tuple[int, int, int] = (520, 1504, 32), *, kept: int = 3, version: str | None = None, **options: Any
) -> QuantLinear:
    packed = packed_on_gpu(shape, True)
    outliers = random_outliers(packed, kept).to(GPU) if kept else None
    linear = QuantLinear(packed, torch.randn(packed.out_features, device=GPU).half(), outliers)
    assert linear.prepare(version, keep_packed=True, **options).kernel.name == "cuda"
    return linear


def expected(linear: QuantLinear, x: Tensor) -> Tensor:
    y = reference(x.reshape(-1, linear.in_features), linear.packed, linear.outliers, linear.bias)
    return y.reshape(*x.shape[:-1], linear.out_features)


@pytest.mark.parametrize("version", [None, *VERSIONS])
@pytest.mark.parametrize("dtype", [*dtypes(), torch.float32])
def test_a_layer_takes_any_shape_and_stride(dtype: torch.dtype, version: str | None) -> None:
    linear = layer(version=version)
    wide = torch.randn(40, 2, 1600, device=GPU).to(dtype)
    for x in (
        wide[0, 0, :1504],
        wide[:3, :, :1504],
        wide[..., 8:1512],
        wide[..., 1:1505],
        wide[::3, 1, 96:],
        wide.transpose(0, 1)[..., :1504],
        wide[:1, :1, :1504].expand(3, 5, 1504),
        torch.randn(1504, 6, device=GPU).to(dtype).t(),
    ):
        y = linear(x)
        assert y.dtype == dtype and y.shape == (*x.shape[:-1], 520) and y.is_contiguous()
        assert relative(y, expected(linear, x)) <= LIMIT.get(dtype, 5e-4) * 1.2
    for shape in ((0, 1504), (2, 0, 1504)):
        assert linear(torch.empty(shape, device=GPU, dtype=dtype)).shape == (*shape[:-1], 520)


def test_a_width_that_is_no_multiple_of_8() -> None:
    linear = layer((24, 100, -1), kept=2)
    for rows in (1, 5, 70):
        wide = torch.full((rows, 112), float("nan"), device=GPU).half()
        wide[:, :100] = torch.randn(rows, 100, device=GPU)
        for x in (wide[:, :100], wide[:, :100].contiguous()):
            assert relative(linear(x), expected(linear, x)) < 6e-4


def test_wrong_input_is_told() -> None:
    linear = layer()
    for x, words in (
        (torch.zeros(2, 1504).half(), "x is on cpu and the weight on cuda:0"),
        (torch.zeros(2, 1504, device=GPU).int(), "x is int32"),
        (torch.zeros(2, 1500, device=GPU).half(), r"shape \[2, 1500\]"),
    ):
        with pytest.raises(AwqError, match=words):
            linear(x)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_cuda_graphs(rows: int, version: str) -> None:
    """Captured once, replayed on other values, also while other calls run in between."""
    linear, other = layer(version=version), layer((1000, 1504, 32), version=version)
    x = torch.randn(rows, 1504, device=GPU).half()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        linear(x), other(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, z = linear(x), other(x)
    for _ in range(4):
        x.copy_(torch.randn_like(x))
        graph.replay()
        again = linear(x)
        graph.replay()
        assert torch.equal(y, again) and torch.equal(z, other(x))


@pytest.mark.parametrize("dtype", dtypes())
def test_compiled_into_one_graph(dtype: torch.dtype) -> None:
    linear = layer(dtype=dtype).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: torch.relu(linear(x * 2)) + 1, fullgraph=True, dynamic=True)
        for rows in (2, 20, 33):
            x = torch.randn(2, rows, 1504, device=GPU).to(dtype)
            true = torch.relu(expected(linear, x * 2)) + 1
            assert relative(compiled(x), true) < LIMIT[dtype] * 1.5


def test_compiled_with_graphs_of_its_own() -> None:
    """Two numbers of rows that split tiles: what a warm-up or a capture leaves behind would be refused as a leak."""
    linear = layer((520, 4096, 128))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # torch's own
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: torch.relu(linear(x * 2)) + 1, mode="reduce-overhead", dynamic=False)
        for _ in range(4):  # warm-up, capture, replays
            for rows in (9, 40):
                x = torch.randn(rows, 4096, device=GPU).half()
                y = compiled(x).clone()
                assert relative(y, torch.relu(expected(linear, x * 2)) + 1) < LIMIT[torch.float16] * 1.5
                assert torch.equal(linear(x), linear(x))  # eager calls in between have their own place


def test_a_graph_leaves_nothing_behind() -> None:
    linear = layer((520, 4096, 128))
    x = torch.randn(16, 4096, device=GPU).half()

    def capture() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            linear(x)
        graph.replay()
        torch.cuda.synchronize()

    linear(x), capture()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        capture()
    assert torch.cuda.memory_allocated() == before


def test_the_gradient_of_x() -> None:
    linear = layer(version="GEMM")
    for dtype, limit in ((torch.float16, 1e-3), (torch.float32, 1e-3)):
        x = torch.randn(20, 1504, device=GPU).to(dtype).requires_grad_()
        grad = torch.randn(20, 520, device=GPU).to(dtype)
        linear(x).backward(grad)
        true = grad.float() @ reference(torch.eye(1504, device=GPU), linear.packed, linear.outliers).t()
        assert x.grad is not None and relative(x.grad, true) < limit


def test_large_float32_values() -> None:
    linear = layer()
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(12, 1504, device=GPU).to(dtype) * 10.0 ** torch.arange(-6, 6, device=GPU).unsqueeze(1)
        for row, true in zip(linear(x), expected(linear, x), strict=True):
            assert row.dtype == dtype and relative(row, true) < 1e-3


def test_streams_do_not_meet() -> None:
    """The same layers in two streams at once: what one call leaves for later must be its own."""
    linears = [layer(shape) for shape in ((520, 1504, 32), (4096, 2048, 128), (640, 11008, 32))]
    for rows in (1, 8, 16, 64, 200):
        inputs = [[torch.randn(rows, each.in_features, device=GPU).half() for each in linears] for _ in range(2)]
        truths = [[each(x) for each, x in zip(linears, xs, strict=True)] for xs in inputs]
        streams = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        results: list[list[Tensor]] = [[], []]
        for _, (index, stream) in itertools.product(range(20), enumerate(streams)):
            with torch.cuda.stream(stream):
                results[index] += [each(x) for each, x in zip(linears, inputs[index], strict=True)]
        torch.cuda.synchronize()
        for found, true in zip(results, truths, strict=True):
            assert all(torch.equal(y, true[number % 3]) for number, y in enumerate(found))


def test_threads_do_not_meet() -> None:
    linear = layer((4096, 2048, 128))
    wrong: list[int] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = torch.randn(
                2 + 7 * (seed % 2), 2048, device=GPU, generator=torch.Generator(GPU).manual_seed(seed)
            ).half()
            first = linear(x)
            wrong.extend(seed for _ in range(200) if not torch.equal(linear(x), first))
            if relative(first, expected(linear, x)) > 1e-3:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one() -> None:
    linear = layer()
    x = torch.randn(40, 1504, device=GPU).half()
    true = linear(x)
    linear.to("cuda:1")
    for rows in (1, 40):
        y = linear(x[:rows].to("cuda:1"))
        assert y.device.index == 1 and relative(y.to(GPU), true[:rows].float()) < 1e-3
    with pytest.raises(AwqError, match="x is on cuda:0 and the weight on cuda:1"):
        linear(x)


def test_moved_to_the_cpu_and_back() -> None:
    linear = layer()
    x = torch.randn(3, 1504, device=GPU).half()
    y = linear(x)
    assert linear.to("cpu").choice.kernel.name != "cuda"
    assert relative(linear(x.cpu()).to(GPU), y.float()) < 1e-2
    assert torch.equal(linear.to(GPU)(x), y)


def test_repacking_holds_one_linear_twice_at_most() -> None:
    shape, count = (4096, 4096, 128), 6
    source = random_packed(*shape)
    QuantLinear(source).to(GPU).prepare()  # what is made once
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linears = []
    for _ in range(count):
        linears.append(QuantLinear(source).to(GPU))
        linears[-1].prepare()
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    assert held <= 1.01 * count * source.nbytes
    assert peak <= 1.01 * (count + 1) * source.nbytes


def test_where_the_versions_cross_is_measured_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWQ_CROSSOVER")
    monkeypatch.setenv("AWQ_CACHE", str(tmp_path))
    crossover._known.cache_clear()
    try:
        limit = layer((4096, 2048, 128), kept=0)._gemv_rows
        assert 1 <= limit <= crossover.MOST_ROWS
        assert torch.cuda.get_device_name() in (tmp_path / "crossover" / "rows.json").read_text()
        crossover._known.cache_clear()
        monkeypatch.setattr(crossover, "_measure", lambda run, device: pytest.fail("measured again"))
        assert layer((4096, 2048, 128), kept=0)._gemv_rows == limit
        assert layer((4096, 2048, 128), kept=0, version="GEMM")._gemv_rows == 0
        assert layer((520, 1504, 32), version="GEMV")._gemv_rows == EVERY_ROW
    finally:
        crossover._known.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda") / "awq"
    model = tiny_llama()
    text = CalibrationSet(random_tokens(6, 48), ("random tokens",))
    report = quantize_model(model, QuantConfig(group_size=32, outlier_ratio=0.03), text, device="cpu", progress=False)
    save_quantized(model, folder, report, tokenizer=byte_tokenizer())
    return folder


@pytest.mark.parametrize("version", [None, *VERSIONS])
@pytest.mark.parametrize("dtype", dtypes())
def test_a_model_runs_on_them(checkpoint: Path, dtype: torch.dtype, version: str | None) -> None:
    model = load_quantized(checkpoint, version=version, dtype=dtype, device="cuda")
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {linear.choice.kernel.name for linear in linears} == {"cuda"}
    tokens = random_tokens(2, 24, seed=3)
    true = load_dequantized(checkpoint)(input_ids=tokens).logits
    with torch.no_grad():
        y = model(input_ids=tokens.to(GPU)).logits
    assert relative(y.cpu(), true) < (0.005 if dtype == torch.float16 else 0.04)
    with torch.inference_mode():
        assert model.generate(tokens.to(GPU), max_new_tokens=4, do_sample=False).shape[1] > 24
