"""A mixture of experts all the way, as a user has it: a folder of transformers' files, AutoAWQ's calls, tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from awq import AutoAWQForCausalLM
from awq.linear import QuantLinear
from tests.cli.run import run, run_json
from tests.tiny import VOCABULARY, byte_tokenizer, random_tokens

pytestmark = [  # what saving says of widths as tiny as these
    pytest.mark.filterwarnings("ignore:.*may run on vLLM's slower:UserWarning"),
    pytest.mark.filterwarnings("ignore:vLLM cannot split:UserWarning"),
]
EXPERTS = [f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "awq"
    model = AutoAWQForCausalLM.from_pretrained(source)
    config = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    model.quantize(byte_tokenizer(), config, calib_data="prose", max_calib_samples=8, max_calib_seq_len=64)
    model.save_quantized(folder)
    return folder


def test_it_loads_and_generates(quantized: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(quantized, device_map="cpu")
    experts = [module for name, module in model.named_modules() if ".experts." in name and name.endswith("_proj")]
    assert len(experts) == 2 * 4 * 3
    assert all(isinstance(module, QuantLinear) for module in experts)
    answer = model.generate(random_tokens(1, 8), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 12)


def test_what_other_engines_leave_float_is_listed_by_its_stored_name(quantized: Path) -> None:
    settings = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == [
        *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)),
        "lm_head",
        *(f"model.layers.{layer}.mlp.gate" for layer in range(2)),  # as transformers calls it
    ]


def test_inspect_shows_how_many_tokens_each_expert_was_given(quantized: Path) -> None:
    found = run_json("inspect", quantized)
    assert sorted(found["experts"]) == EXPERTS
    for prefix, experts in found["experts"].items():
        assert experts["experts"] == 4
        given = {name: linear["tokens"] for name, linear in report(quantized).items() if name.startswith(prefix)}
        assert len(given) == 12
        assert sum(given.values()) == 3 * 2 * 8 * 64  # three linears, two experts a token
        assert experts["fewest_tokens"] == min(given.values()) <= experts["median_tokens"] <= experts["most_tokens"]
    assert found["linears"][f"{EXPERTS[0]}.2.w1"]["loss"] is not None
    assert "Experts" in run("inspect", quantized).stdout


def report(folder: Path) -> dict[str, dict[str, int]]:
    linears: dict[str, dict[str, int]] = json.loads((folder / "awq_report.json").read_text())["linears"]
    return linears
