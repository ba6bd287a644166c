"""Other projects' packages are stand-ins here: they keep what they are given, and multiply by what it means."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq.bench.kernels.peers import PEERS, Gemlite, Humming, Machete, Marlin, Peer, TorchInt4, attempt, find_peers
from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.kernels.weights import random_linear
from awq.errors import ConfigError
from awq.packing import GEMM_ORDER, PackedInt4, unpack_words

SETTING = Setting(Shape(64, 128), 64, torch.float16)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def assert_multiplies(peer: Peer, setting: Setting, tolerance: float = 2e-3) -> None:
    packed, _ = random_linear(setting)
    x = torch.randn(3, setting.shape.in_features).to(peer.dtype(setting.dtype))
    y = peer.prepare(packed, setting)(x)
    expected = x.float() @ packed.dequantize().t()
    assert (y.float() - expected).norm() < tolerance * expected.norm()


def test_names_do_not_sound_like_kernels_of_this_package() -> None:
    assert [peer.name for peer in PEERS] == ["torch_int4", "gemlite", "humming", "marlin", "machete"]
    assert not any(word in peer.name for peer in PEERS for word in ("gemv", "gemm"))


def test_peers_by_name() -> None:
    assert find_peers(None) == PEERS
    assert [peer.name for peer in find_peers(["marlin", "gemlite"])] == ["marlin", "gemlite"]
    with pytest.raises(ConfigError, match=r"'triton'.*machete"):
        find_peers(["triton"])


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_absent_packages_and_odd_linears_are_reasons(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = peer.rejects(SETTING)
    assert reason is not None and "not installed" in reason
    odd = peer.rejects(Setting(SETTING.shape, 16, torch.float16))
    assert odd == "it has no groups of 16"
    kept = peer.rejects(Setting(SETTING.shape, 64, torch.float16, outlier_ratio=0.01))
    assert kept == "it has no fp16 outlier channels"


def test_what_goes_wrong_is_a_reason() -> None:
    def fail() -> int:
        raise ValueError("first line\nsecond")

    assert attempt(lambda: 3) == (3, None)
    assert attempt(fail) == (None, "ValueError: first line")
    assert attempt(lambda: next(iter(()))) == (None, "StopIteration: no message")


def test_torch_takes_bf16_and_widths_of_its_tiles() -> None:
    assert TorchInt4().dtype(torch.float16) == torch.bfloat16
    reason = TorchInt4().rejects(Setting(Shape(64, 192), 64, torch.float16))
    assert reason is not None and "192" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("zero_point", [True, False])
def test_torch_multiplies(zero_point: bool) -> None:
    setting = Setting(Shape(256, 1024), 128, torch.float16, zero_point)
    packed, _ = random_linear(setting, "cuda")
    x = torch.randn(3, 1024, device="cuda", dtype=torch.bfloat16)
    y, expected = TorchInt4().prepare(packed, setting)(x), x.float() @ packed.dequantize().t()
    assert (y.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("zero_point", [True, False])
def test_gemlite(zero_point: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer:
        def __init__(self, bits: int, **options: Any) -> None:
            assert bits == 4
            assert options["in_features"] == 128 and options["out_features"] == 64

        def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor, bias: None) -> None:
            assert codes.dtype == torch.uint8 and scales.is_contiguous() and zeros.dtype == scales.dtype
            self.weight = (codes.view(64, 2, 64).float() - zeros.float()[..., None]) * scales.float()[..., None]

        def __call__(self, x: Tensor) -> Tensor:
            return (x.float() @ self.weight.view(64, 128).t()).to(x.dtype)

    install(monkeypatch, "gemlite", GemLiteLinear=Layer, DType=SimpleNamespace(FP16=1, BF16=2))
    assert_multiplies(Gemlite(), Setting(SETTING.shape, 64, torch.float16, zero_point))


def test_humming(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.Module):
        def __init__(self, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
            super().__init__()
            assert (shape_n, shape_k, weight_config["quant_method"]) == (64, 128, "awq")

        def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
            self.packed = PackedInt4(**tensors)

        def transform(self) -> None:
            self.ready = True

        def forward(self, x: Tensor) -> Tensor:
            assert self.ready
            return (x.float() @ self.packed.dequantize().t()).to(x.dtype)

    install(monkeypatch, "humming", HummingLayer=Layer)
    install(monkeypatch, "humming.layer", HummingLayer=Layer)
    assert_multiplies(Humming(), SETTING)


UTILS = "vllm.model_executor.layers.quantization.utils"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's functions without their permutations."""

    def repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
        assert b_q_weight.shape == (size_k, size_n // 8) and num_bits == 4
        return unpack_words(b_q_weight, GEMM_ORDER)

    def marlin(**given: Any) -> Tensor:
        codes, scales = given["weight"].float(), given["weight_scale"].float()
        zeros = given["weight_zp"].float() if given["wtype"] == "uint4" else 8.0
        size = given["input_size_per_partition"] // scales.shape[0]
        spread = zeros.repeat_interleave(size, 0) if isinstance(zeros, Tensor) else zeros
        weight = (codes - spread) * scales.repeat_interleave(size, 0)
        return (given["input"].float() @ weight).to(given["input"].dtype)

    def machete(a: Tensor, b_q: Tensor, b_group_scales: Tensor, b_group_size: int, **given: Any) -> Tensor:
        weight = b_q.float() * b_group_scales.float().repeat_interleave(b_group_size, 0)
        if given["b_type"] == "uint4b8":
            weight -= 8 * b_group_scales.float().repeat_interleave(b_group_size, 0)
        else:
            weight += given["b_group_zeros"].float().repeat_interleave(b_group_size, 0)
        return (a.float() @ weight).to(a.dtype)

    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", UTILS.rpartition(".")[0], UTILS):
        install(monkeypatch, name)
    install(monkeypatch, "vllm.scalar_type", scalar_types=SimpleNamespace(uint4="uint4", uint4b8="uint4b8"))
    install(
        monkeypatch,
        "vllm._custom_ops",
        awq_marlin_repack=repack,
        machete_prepack_B=lambda weight, *types: weight,
        machete_mm=machete,
    )
    install(
        monkeypatch,
        f"{UTILS}.marlin_utils",
        marlin_make_empty_g_idx=lambda device: torch.empty(0, dtype=torch.int32, device=device),
        marlin_make_workspace_new=lambda device: torch.zeros(132, dtype=torch.int32, device=device),
        awq_to_marlin_zero_points=lambda words, size_k, size_n, num_bits: unpack_words(words, GEMM_ORDER),
        marlin_permute_scales=lambda scales, size_k, size_n, group_size: scales,
        apply_gptq_marlin_linear=marlin,
    )
    pack = lambda values, kind, packed_dim: values  # noqa: E731
    install(monkeypatch, f"{UTILS}.quant_utils", pack_quantized_values_into_int32=pack)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("peer", [Marlin(), Machete()], ids=["marlin", "machete"])
def test_vllm(peer: Peer, zero_point: bool) -> None:
    assert_multiplies(peer, Setting(SETTING.shape, 64, torch.float16, zero_point), 5e-3)


@pytest.mark.usefixtures("vllm")
def test_a_function_that_changed_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["vllm._custom_ops"], "awq_marlin_repack")
    packed, _ = random_linear(SETTING)
    _, reason = attempt(lambda: Marlin().prepare(packed, SETTING))
    assert reason is not None and reason.startswith("AttributeError") and "awq_marlin_repack" in reason
