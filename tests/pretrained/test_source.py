import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq.errors import CheckpointError, ConfigError, ModelNotFoundError
from awq.pretrained.source import check_finite, find_source, pick_device, pick_dtype, skeleton
from tests.tiny import save_tiny, tiny_llama


def test_a_folder_loads(tmp_path: Path) -> None:
    source = find_source(save_tiny(tmp_path / "model"))
    assert source.config().model_type == "llama"
    model = source.load()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert not model.training
    assert source.tokenizer()("abc")["input_ids"]


def test_the_fingerprint_tells_models_apart(tmp_path: Path) -> None:
    first, again = save_tiny(tmp_path / "a"), save_tiny(tmp_path / "b")
    other = save_tiny(tmp_path / "c", tiny_llama(seed=1))
    assert find_source(first).fingerprint() == find_source(again).fingerprint() != find_source(other).fingerprint()


def test_a_skeleton_has_no_weights(tmp_path: Path) -> None:
    model = skeleton(find_source(save_tiny(tmp_path)).config())
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())


def test_missing_folder() -> None:
    with pytest.raises(ModelNotFoundError, match=r"\./nowhere does not exist"):
        find_source("./nowhere")


@pytest.mark.parametrize("name", ["", None, 5])
def test_what_names_nothing(name: Any) -> None:
    with pytest.raises(ConfigError, match="names no model"):
        find_source(name)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="owner/absent is no local folder"):
        find_source("owner/absent")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_source(tmp_path)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not a GGUF"):
        find_source(tmp_path / "weights.bin")


def test_a_broken_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match=r"model\.gguf is truncated or damaged"):
        find_source(tmp_path / "model.gguf").config()


def test_pickle_only(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        find_source(tmp_path)


def test_truncated_weights(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        find_source(tmp_path)


def test_already_quantized(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match="already quantized"):
        find_source(tmp_path).config()


def test_an_architecture_nobody_knows(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(CheckpointError, match="nonesuch"):
        find_source(tmp_path).config()


def test_nan_weights_are_named() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        check_finite(model, "tiny")


@pytest.mark.parametrize("device", ["warp", "cuda:99", "meta", "mps:3"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        pick_device(device)


def test_weights_that_are_missing_or_of_another_shape_are_named(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in another shape"):
        find_source(tmp_path).load()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        find_source(tmp_path).load()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("auto", None),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        (torch.half, torch.half),
    ],
)
def test_dtypes_by_name(given: Any, expected: Any) -> None:
    assert pick_dtype(given) is expected


@pytest.mark.parametrize("dtype", ["float17", "int8", torch.int8, "nn"])
def test_dtypes_that_are_none(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="use float16"):
        pick_dtype(dtype)
