from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from awq.structure.linears import as_linear, linear_shape
from awq.structure.plan import make_plan
from tests.tiny import random_tokens


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=128)).eval()


def test_a_conv1d_is_a_linear_with_its_weight_transposed() -> None:
    conv, x = Conv1D(24, 16), torch.randn(2, 3, 16)
    nn.init.normal_(conv.bias)
    linear = as_linear(conv)
    assert linear_shape(conv) == linear_shape(linear) == (16, 24)
    assert isinstance(linear, nn.Linear)
    assert torch.allclose(linear(x), conv(x), atol=1e-6)


@pytest.mark.parametrize("module", [nn.Linear(8, 16), nn.LayerNorm(8), nn.Embedding(8, 16)])
def test_other_modules_are_left_alone(module: nn.Module) -> None:
    assert as_linear(module) is module
    assert linear_shape(module) == ((8, 16) if isinstance(module, nn.Linear) else None)


@pytest.mark.filterwarnings("ignore:.*may run on vLLM")
def test_the_plan_is_the_same_without_weights() -> None:
    with torch.device("meta"):
        skeleton = tiny_gpt2()
    assert make_plan(skeleton, QuantConfig()) == make_plan(tiny_gpt2(), QuantConfig())
    assert len(make_plan(skeleton, QuantConfig()).linears) == 8


def test_a_conv1d_that_stays_float_is_stored_as_it_was(tmp_path: Path) -> None:
    model, tokens = tiny_gpt2(), random_tokens(3, 40)
    weight = model.transformer.h[0].mlp.c_proj.weight.clone()
    config = QuantConfig(group_size=32, modules_to_not_convert=("mlp.c_proj",))
    report = quantize_model(model, config, CalibrationSet(tokens, ("random",)), device="cpu", progress=False)
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantLinear)
    save_quantized(model, tmp_path / "awq", report)
    plain = load_dequantized(tmp_path / "awq")
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.float32)
    assert isinstance(loaded.transformer.h[0].mlp.c_proj, Conv1D)
    assert torch.equal(loaded.transformer.h[0].mlp.c_proj.weight, weight.half().float())
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert (loaded(input_ids=tokens).logits - expected).norm() / expected.norm() < 1e-4
