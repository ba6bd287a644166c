import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import AutoTokenizer

from awq.checkpoint.read import open_checkpoint
from awq.config import EFFORTS, QuantConfig
from awq.data.calibration import CalibrationSet
from awq.errors import CalibrationError, CheckpointError, ConfigError, ModelNotFoundError, OutputExistsError
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_folder, quantize_model
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from tests.efforts import every_effort
from tests.tiny import byte_tokenizer, random_tokens, save_tiny, tiny_llama

CONFIG = QuantConfig(group_size=32, outlier_ratio=0.03, effort="fast")
TEXT = CalibrationSet(random_tokens(6, 48), ("random tokens",))
SMALL = {"calibration": ["prose"], "samples": 4, "seq_len": 64, "device": "cpu", "progress": False}


def quantized_tiny(**changes: Any) -> tuple[Any, dict[str, Any]]:
    model = tiny_llama(**changes)
    return model, quantize_model(model, CONFIG, TEXT, device="cpu", progress=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=random_tokens(2, 24, seed=5)).logits.float()
        return result


def distance(model: Any, other: Any) -> float:
    old = logits(other)
    return float((logits(model) - old).norm() / old.norm())


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_linears_of_the_blocks_are_replaced_and_reported() -> None:
    model, report = quantized_tiny()
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert sorted(names) == sorted(report["linears"])
    assert len(names) == 14
    assert report["not_converted"] == {"lm_head": "outside the blocks"}
    assert report["linears"]["model.layers.0.mlp.down_proj"]["scaled_by"] == "mlp.up_proj"
    json.dumps(report)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same_model(tmp_path: Path, tied: bool) -> None:
    model, report = quantized_tiny(tie_word_embeddings=tied)
    save_quantized(model, tmp_path / "awq", report, tokenizer=byte_tokenizer())
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.float32)
    plain = load_dequantized(tmp_path / "awq")
    # norms and embeddings are stored in float16
    assert (logits(loaded) - logits(model)).norm() / logits(model).norm() < 2e-3
    assert (logits(loaded) - logits(plain)).norm() / logits(plain).norm() < 1e-5
    assert loaded.generation_config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "awq")("abc")["input_ids"]
    stored = open_checkpoint(tmp_path / "awq")
    assert ("lm_head.weight" in stored.float_names) == (not tied)


def test_outlier_channels_travel_in_their_own_folder_and_can_be_left_out(tmp_path: Path) -> None:
    model, report = quantized_tiny()
    save_quantized(model, tmp_path / "awq", report)
    original = logits(tiny_llama())
    with_outliers, without = (load_dequantized(tmp_path / "awq", outliers=on) for on in (True, False))
    assert (tmp_path / "awq" / "outliers" / "model.safetensors").exists()
    assert (logits(with_outliers) - original).norm() < (logits(without) - original).norm()


def test_bf16_models_keep_their_dtype(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    report = quantize_model(model, CONFIG, TEXT, device="cpu", progress=False)
    save_quantized(model, tmp_path / "awq", report)
    assert json.loads((tmp_path / "awq" / "config.json").read_text())["dtype"] == "bfloat16"
    assert open_checkpoint(tmp_path / "awq").tensor("model.norm.weight").dtype == torch.bfloat16


@every_effort
def test_quantize_folder_is_repeatable_and_knows_its_own_work(tmp_path: Path, effort: str) -> None:
    source, config = save_tiny(tmp_path / "model"), replace(CONFIG, effort=effort)
    first = quantize_folder(source, tmp_path / "a", config, **SMALL)  # type: ignore[arg-type]
    second = quantize_folder(source, tmp_path / "b", config, **SMALL)  # type: ignore[arg-type]
    assert digests(first.path) == digests(second.path)
    again = quantize_folder(source, tmp_path / "a", config, **SMALL)  # type: ignore[arg-type]
    assert again.already_complete
    assert again.report == first.report
    with pytest.raises(OutputExistsError, match="--overwrite"):
        quantize_folder(source, tmp_path / "a", QuantConfig(group_size=64), **SMALL)  # type: ignore[arg-type]
    other = next(other for other in EFFORTS if other != effort)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        quantize_folder(source, tmp_path / "a", replace(CONFIG, effort=other), **SMALL)  # type: ignore[arg-type]
    replaced = quantize_folder(source, tmp_path / "a", QuantConfig(group_size=64), overwrite=True, **SMALL)  # type: ignore[arg-type]
    assert replaced.report["recipe"]["config"]["group_size"] == 64


def test_the_default_group_size_is_said() -> None:
    with pytest.warns(UserWarning, match="Group size 64: 128 does not divide the 64 inputs"):
        report = quantize_model(tiny_llama(), QuantConfig(), TEXT, device="cpu", progress=False)
    assert report["recipe"]["config"]["group_size"] == 64


def test_nan_activations_are_said_and_the_rest_goes_on() -> None:
    model = tiny_llama()
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: (args[0] * float("nan"), *args[1:]))
    with pytest.warns(
        UserWarning, match=r"model\.layers\.1: activations are not finite in model\.layers\.1\.self_attn"
    ):
        report = quantize_model(model, CONFIG, TEXT, device="cpu", progress=False)
    assert report["linears"]["model.layers.0.mlp.up_proj"]["fallback"] is None
    assert report["linears"]["model.layers.1.mlp.up_proj"]["fallback"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"config": QuantConfig(bits=3)}, ConfigError, "bits=3 cannot be stored"),
        ({"config": QuantConfig(group_size=128)}, ConfigError, "group size 128 does not divide"),
        ({"model": "./absent"}, ModelNotFoundError, "absent"),
        ({"device": "cuda:99"}, ConfigError, "cuda:99"),
        ({"samples": 0}, CalibrationError, "0 samples"),
        ({"calibration": ["./absent.txt"]}, CalibrationError, r"absent\.txt"),
        ({"seq_len": 2048}, CalibrationError, "longer than the 1024"),
    ],
)
def test_wrong_arguments_leave_nothing_behind(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": save_tiny(tmp_path / "model"), "config": CONFIG, **SMALL, **changes}
    with pytest.raises(error, match=message):
        quantize_folder(output=tmp_path / "awq", **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nan_weights_stop_it_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("inf")
    source = save_tiny(tmp_path / "model", model)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight"):
        quantize_folder(source, tmp_path / "awq", CONFIG, **SMALL)  # type: ignore[arg-type]


def test_a_foreign_tokenizer_is_noticed() -> None:
    with pytest.raises(CalibrationError, match=r"token 299, .* only 200"):
        quantize_model(tiny_llama(vocab_size=200), CONFIG, CalibrationSet(torch.tensor([[1, 299]]), ()), progress=False)


def test_a_model_quantized_in_part_is_refused() -> None:
    model, _ = quantized_tiny()
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_model(model, CONFIG, TEXT, device="cpu", progress=False)


def test_a_model_on_the_disk_in_part_is_refused() -> None:
    model = tiny_llama()
    model.hf_device_map = {"model": "disk", "lm_head": "cpu"}
    with pytest.raises(ConfigError, match="on the disk in part: quantize its folder instead"):
        quantize_model(model, CONFIG, TEXT, device="cpu", progress=False)


def test_generation_settings_that_transformers_would_not_save_travel_along(tmp_path: Path) -> None:
    model, report = quantized_tiny()
    model.generation_config.temperature = 0.9  # without do_sample, as old models have it
    save_quantized(model, tmp_path / "awq", report)
    assert json.loads((tmp_path / "awq" / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_finished_folder_that_lost_its_weights_is_not_complete(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model")
    quantize_folder(source, tmp_path / "awq", CONFIG, **SMALL)  # type: ignore[arg-type]
    (tmp_path / "awq" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        quantize_folder(source, tmp_path / "awq", CONFIG, **SMALL)  # type: ignore[arg-type]


def test_a_name_that_excludes_nothing_is_said() -> None:
    config = QuantConfig(group_size=32, modules_to_not_convert=("typo_proj",))
    with pytest.warns(UserWarning, match="no module's name has 'typo_proj'"):
        quantize_model(tiny_llama(), config, TEXT, device="cpu", progress=False)


def one_module_in_two_blocks(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj


def one_weight_in_two_linears(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight


@pytest.mark.parametrize("share", [one_module_in_two_blocks, one_weight_in_two_linears])
def test_shared_linears_stay_float_in_each_of_their_places(share: Callable[[Any], None], tmp_path: Path) -> None:
    model = tiny_llama()
    share(model)
    report = quantize_model(model, QuantConfig(group_size=32), TEXT, device="cpu", progress=False)
    shared = [name for name, reason in report["not_converted"].items() if reason == "shared with another place"]
    assert len(shared) == 2 and len(report["linears"]) == 12
    save_quantized(model, tmp_path / "awq", report)
    kept = json.loads((tmp_path / "awq/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(kept) == {*shared, "lm_head"}
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.float32)
    assert distance(loaded, load_dequantized(tmp_path / "awq")) < 1e-4
    assert distance(loaded, model) < 3e-3


@every_effort
def test_a_block_that_is_run_again_and_again_is_quantized_once(effort: str) -> None:
    model = tiny_llama(num_hidden_layers=3)
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    original = copy.deepcopy(model)
    report = quantize_model(model, QuantConfig(group_size=32, effort=effort), TEXT, device="cpu", progress=False)
    assert len(report["linears"]) == 7
    assert 0 < distance(model, original) < 0.3


def test_a_model_that_is_dispatched_over_devices_is_quantized_and_still_runs() -> None:
    """One device under two names: each block has hooks that move its inputs, which would not find it elsewhere."""
    model, alone = tiny_llama(), tiny_llama()
    names = ("model.embed_tokens", "model.rotary_emb", "model.layers.1", "model.norm", "lm_head")
    places: dict[str, Any] = {**dict.fromkeys(names, "cpu"), "model.layers.0": torch.device("cpu")}
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert model.hf_device_map == places
    report = quantize_model(model, CONFIG, TEXT, device="cpu", progress=False)
    assert report["linears"] == quantize_model(alone, CONFIG, TEXT, device="cpu", progress=False)["linears"]
    assert torch.equal(logits(model), logits(alone))
    assert hasattr(model.model.layers[0], "_hf_hook")
