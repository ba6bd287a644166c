"""Names that scripts written for AutoAWQ import."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from awq.compat import _OLD_MODULES
from awq.errors import AwqError
from awq.packing import pack
from tests.tiny import byte_tokenizer, tiny_llama


@pytest.mark.parametrize("module", _OLD_MODULES)
def test_every_old_name_has_a_home(module: str) -> None:
    old = importlib.import_module(module)
    assert dir(old) == sorted(_OLD_MODULES[module])
    assert all(callable(getattr(old, name)) for name in dir(old))


def test_old_imports_as_scripts_write_them() -> None:
    """In a fresh process, where nothing of this package is imported yet."""
    lines = [
        "from awq.modules.linear.gemm import WQLinear_GEMM",
        "from awq.modules.linear import WQLinear_GEMV, WQLinear_GEMVFast",
        "import awq.utils.packing_utils as packing_utils",
        "from awq.models.auto import AutoAWQForCausalLM",
        "import awq",
        "assert WQLinear_GEMM is WQLinear_GEMV is WQLinear_GEMVFast is awq.modules.linear.WQLinear_GEMM",
        "assert AutoAWQForCausalLM is awq.AutoAWQForCausalLM",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_has_no_home_fails_as_imports_do() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"awq\.modules\.fused"):
        importlib.import_module("awq.modules.fused")
    with pytest.raises(AttributeError, match="no attribute 'WQLinear_Marlin'"):
        importlib.import_module("awq.modules.linear").WQLinear_Marlin  # noqa: B018


def test_quantizer_can_be_subclassed_but_not_built() -> None:
    from awq.quantize.quantizer import AwqQuantizer

    class Own(AwqQuantizer):
        pass

    with pytest.raises(AwqError, match="quantize_model"):
        Own(model=None)


def test_packing_helpers() -> None:
    from awq.utils import packing_utils

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 64), generator=generator)
    zeros = torch.randint(0, 16, (24, 2), generator=generator)
    packed = pack(codes, zeros, torch.rand(24, 2, generator=generator))
    raw = packing_utils.unpack_awq(packed.qweight, packed.qzeros, 4)
    iweights, izeros = packing_utils.reverse_awq_order(*raw, 4)
    assert torch.equal(iweights, codes.t().to(torch.int8))
    assert torch.equal(izeros, zeros.t().to(torch.int8))
    weight = packing_utils.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 32)
    assert torch.equal(weight, packed.dequantize(torch.float16).t())
    with pytest.raises(AwqError, match="bits=3"):
        packing_utils.unpack_awq(packed.qweight, packed.qzeros, 3)


@pytest.mark.parametrize(("found", "name"), [(None, "cpu"), ("cuda", "cuda:0"), ("mps", "mps")])
def test_best_device(found: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq.utils.utils import get_best_device

    accelerator = found and torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    assert get_best_device() == name


def test_evaluate_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    from awq.evaluation import evaluate_perplexity

    rows = [{"text": "one line of text"}, {"text": ""}, {"text": "and another"}]
    stub = SimpleNamespace(load_dataset=lambda *args, **options: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert evaluate_perplexity(tiny_llama(), byte_tokenizer()) > 1
