import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.errors import CheckpointError, ConfigError, KernelNotSupportedError, ModelNotFoundError, OutOfMemoryError
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from tests.tiny import random_tokens, tiny_llama

GOLDEN = ["llama_gemm_g64", "llama_gemv_g64", "gpt_neox_gemm_g32", "llama_legacy_018"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("awq") / "tiny"
    model = tiny_llama()
    text = CalibrationSet(random_tokens(4, 48), ("random tokens",))
    report = quantize_model(model, QuantConfig(group_size=32), text, device="cpu", progress=False)
    save_quantized(model, path, report)
    return path


def quant_linears(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("how", ["dequantized", "reference"])
def test_files_that_autoawq_wrote_answer_as_it_said(shared_data: Path, name: str, how: str) -> None:
    path = shared_data / "golden" / "models" / name
    expected = load_file(f"{path}.expected.safetensors")
    if how == "dequantized":
        model = load_dequantized(path)
    else:
        model = load_quantized(path, kernel="reference", device="cpu", dtype=torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:.*(gemv_fast|marlin)")
@pytest.mark.parametrize("version", [None, "auto", "GEMM", "GEMV", "gemv_fast", "marlin"])
def test_every_version_answers_alike(folder: Path, version: str | None) -> None:
    model = load_quantized(folder, version=version, device="cpu")
    assert model.dtype == torch.bfloat16
    expected = load_dequantized(folder)
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        error = model(input_ids=tokens).logits.float() - expected(input_ids=tokens).logits
    assert error.norm() / expected(input_ids=tokens).logits.norm() < 0.03
    generated = model.generate(tokens[:1], max_new_tokens=5, do_sample=False)
    assert generated.shape[1] <= 21


def test_unknown_version_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="unknown kernel version"):
        load_quantized("./absent", version="exllama")


def test_hardware_that_cannot_run_it_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_arguments: Any) -> None:
        raise KernelNotSupportedError("Kernel version not supported on this hardware: ...")

    monkeypatch.setattr("awq.storage.load.select_kernel_version", refuse)
    with pytest.raises(RuntimeError, match="Kernel version not supported on this hardware"):
        load_quantized("./absent", version="GEMV")


def test_a_missing_folder() -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        load_quantized("./absent")


def test_a_float_model_is_no_quantized_one(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load_quantized(tmp_path)


def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight"):
        load_quantized(tmp_path / "copy", device="cpu")


def test_a_config_of_another_shape_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match="mlp"):
        load_quantized(tmp_path / "copy", device="cpu")


def test_a_config_of_another_architecture_is_a_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1"):
        load_quantized(tmp_path / "copy", device="cpu")


def test_an_old_name_of_a_version_is_said_once(folder: Path) -> None:
    with pytest.warns(UserWarning, match="marlin") as said:
        load_quantized(folder, version="marlin", device="cpu")
    assert len(said) == 1


def test_a_gpu_without_room_for_the_model_says_what_helps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(QuantLinear, "prepare", full)
    with pytest.raises(OutOfMemoryError, match=r"does not fit into what is free on cpu.*device_map='auto'"):
        load_quantized(folder, device="cpu")
