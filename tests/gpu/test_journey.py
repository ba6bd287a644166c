"""The journey on an NVIDIA GPU: found, quantized there, saved, loaded and run in both versions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from awq import detect, select_kernel_version
from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from tests.tiny import byte_tokenizer, random_tokens, tiny_llama

pytestmark = pytest.mark.gpu
TEXT = CalibrationSet(random_tokens(6, 48), ("random tokens",))
CONFIG = QuantConfig(group_size=32, outlier_ratio=0.03)


def quantized(device: str, effort: str = CONFIG.effort) -> Any:
    model = tiny_llama()
    report = quantize_model(model, replace(CONFIG, effort=effort), TEXT, device=device, progress=False)
    return model, report


def test_the_gpu_is_found_as_torch_sees_it() -> None:
    devices = [device for device in detect() if device.kind == "cuda"]
    assert len(devices) == torch.cuda.device_count()
    assert devices[0].name == torch.cuda.get_device_name(0)
    assert devices[0].capability == torch.cuda.get_device_capability(0)
    assert select_kernel_version(device="cuda").version == "GEMV"
    assert select_kernel_version(device="cuda", rows=512).version == "GEMM"


def test_quantized_on_the_gpu_as_on_the_cpu() -> None:
    """tf32 and bf16 searches may pick neighbouring scales; the losses agree. In one pass: no linear's input depends on
    what was picked for the linears before it."""
    (_, on_gpu), (_, on_cpu) = quantized("cuda", "fast"), quantized("cpu", "fast")
    for name, report in on_gpu["linears"].items():
        other = on_cpu["linears"][name]
        assert report["scaled_by"] == other["scaled_by"]
        assert report["loss_rounding"] == pytest.approx(other["loss_rounding"], rel=0.02)
        assert report["loss"] == pytest.approx(other["loss"], rel=0.1)


def test_the_default_is_as_good_on_the_gpu_as_on_the_cpu() -> None:
    loss = {device: sum(one["loss"] for one in quantized(device)[1]["linears"].values()) for device in ("cuda", "cpu")}
    assert loss["cuda"] == pytest.approx(loss["cpu"], rel=0.25)  # other choices in one linear move all behind it


@pytest.mark.parametrize("version", [None, "GEMM", "GEMV"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_loaded_and_run(tmp_path: Path, version: str | None, dtype: torch.dtype) -> None:
    model, report = quantized("cuda")
    save_quantized(model, tmp_path / "awq", report, tokenizer=byte_tokenizer())
    loaded = load_quantized(tmp_path / "awq", version=version, dtype=dtype)
    assert {module.device.type for module in loaded.modules() if isinstance(module, QuantLinear)} == {"cuda"}
    tokens = random_tokens(2, 24, seed=3)
    expected = load_dequantized(tmp_path / "awq")(input_ids=tokens).logits
    with torch.no_grad():
        got = loaded(input_ids=tokens.cuda()).logits.float().cpu()
    assert (got - expected).norm() / expected.norm() < (0.005 if dtype == torch.float16 else 0.04)
    assert loaded.generate(tokens.cuda(), max_new_tokens=4, do_sample=False).shape[1] > 24


@pytest.mark.parametrize("kernel", ["reference", "portable", "cuda"])
def test_named_kernels_run_on_the_gpu(kernel: str) -> None:
    model, _ = quantized("cpu")
    layer = model.model.layers[0].mlp.up_proj.to("cuda")
    x = torch.randn(5, 64, device="cuda", dtype=torch.float16)
    expected = x.float() @ layer.outliers.add_to(layer.packed.dequantize()).t()
    layer.prepare(kernel=kernel, keep_packed=True)
    assert (layer(x).float() - expected).norm() / expected.norm() < 2e-3
