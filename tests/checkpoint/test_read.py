"""Reading: every layout and configuration, hub caches, and what AutoAWQ itself wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq.checkpoint import open_checkpoint
from awq.checkpoint.files import TensorFiles
from awq.errors import CheckpointError
from awq.packing import LAYOUTS, to_layout
from tests.checkpoint.small import (
    CONFIG,
    SETTINGS,
    equal,
    random_packed,
    raw_tensors,
    same_contents,
    small_linears,
    write_raw,
    write_small,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_becomes_the_same_weight(tmp_path: Path, layout: str) -> None:
    checkpoint = open_checkpoint(write_raw(tmp_path, raw_tensors(layout), {"version": layout.upper()}))
    assert checkpoint.linears == ["a.b"]
    assert equal(checkpoint.packed("a.b"), random_packed())
    assert checkpoint.quant.layout == layout
    assert checkpoint.shape("a.b").in_features == 64 and checkpoint.shape("a.b").out_features == 16
    assert checkpoint.float_names == ["embed.weight"]
    assert checkpoint.bias("a.b") is None and checkpoint.outliers("a.b") is None and checkpoint.report is None


def test_llm_awq_names_its_zeros_differently(tmp_path: Path) -> None:
    tensors = raw_tensors("gemv_fast")
    tensors["a.b.scaled_zeros"] = tensors.pop("a.b.qzeros")
    checkpoint = open_checkpoint(write_raw(tmp_path, tensors, {"quant_method": "llm-awq", "version": "llm-awq"}))
    assert equal(checkpoint.packed("a.b"), random_packed())
    assert checkpoint.float_names == ["embed.weight"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", ["gemm", "GEMV", "exllama", None])
def test_tensors_decide_where_the_version_is_wrong(tmp_path: Path, layout: str, version: str | None) -> None:
    checkpoint = open_checkpoint(write_raw(tmp_path, raw_tensors(layout), {"version": version}))
    assert equal(checkpoint.packed("a.b"), random_packed()) and checkpoint.quant.layout == layout


@pytest.mark.parametrize("file", ["quant_config.json", "quantize_config.json"])
def test_settings_in_a_file_of_their_own(tmp_path: Path, file: str) -> None:
    write_raw(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / file).write_text(json.dumps({"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.quant.group_size, checkpoint.quant.bits, checkpoint.config) == (32, 4, CONFIG)
    assert equal(checkpoint.packed("a.b"), random_packed())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_size_is_inferred_when_not_written(tmp_path: Path, layout: str) -> None:
    checkpoint = open_checkpoint(write_raw(tmp_path, raw_tensors(layout), {"group_size": None}))
    assert checkpoint.quant.group_size == 32


def test_whole_rows_of_several_widths(tmp_path: Path) -> None:
    wide, narrow = random_packed(128, 8, 128), random_packed(64, 16, 64)
    tensors = {f"wide.{part}": tensor for part, tensor in to_layout("gemm", wide).items()}
    tensors |= {f"narrow.{part}": tensor for part, tensor in to_layout("gemm", narrow).items()}
    for settings in ({"group_size": -1}, {"group_size": None}):
        checkpoint = open_checkpoint(write_raw(tmp_path, tensors, settings))
        assert checkpoint.quant.group_size == -1
        assert equal(checkpoint.packed("wide"), wide) and equal(checkpoint.packed("narrow"), narrow)


@pytest.mark.parametrize(
    ("names", "expected"), [(None, ()), ("lm_head", ("lm_head",)), (["gate", "lm_head"], ("gate", "lm_head"))]
)
def test_modules_to_not_convert(tmp_path: Path, names: object, expected: tuple[str, ...]) -> None:
    folder = write_raw(tmp_path, settings={"modules_to_not_convert": names})
    assert open_checkpoint(folder).quant.modules_to_not_convert == expected


def test_activation_scales_are_no_quantization_scales(tmp_path: Path) -> None:
    tensors = raw_tensors() | {"a.act.scales": torch.rand(64).half()}
    checkpoint = open_checkpoint(write_raw(tmp_path, tensors))
    assert list(checkpoint.act_scales) == ["a.act"]
    assert torch.equal(checkpoint.act_scales["a.act"], tensors["a.act.scales"])
    assert checkpoint.linears == ["a.b"] and checkpoint.float_names == ["embed.weight"]


def test_bias_belongs_to_its_linear(tmp_path: Path) -> None:
    tensors = raw_tensors() | {"a.b.bias": torch.rand(16).bfloat16(), "a.norm.bias": torch.rand(16)}
    checkpoint = open_checkpoint(write_raw(tmp_path, tensors))
    bias = checkpoint.bias("a.b")
    assert bias is not None and torch.equal(bias, tensors["a.b.bias"])
    assert checkpoint.float_names == ["a.norm.bias", "embed.weight"]


def test_one_file_of_any_name(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "awq_model_w4_g128.safetensors")
    assert open_checkpoint(tmp_path).linears == ["a.b"]


def test_hub_cache_with_its_symlinks(tmp_path: Path) -> None:
    write_small(tmp_path / "made", shard_size=600)
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted((tmp_path / "made").rglob("*.*")):
        link = snapshot / path.relative_to(tmp_path / "made")
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / str(len(list(blobs.iterdir())))
        path.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert same_contents(open_checkpoint(snapshot), small_linears())


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(tmp_path / "out", shard_size=600)
    checkpoint = open_checkpoint(tmp_path / "out")
    read: list[str] = []
    load = TensorFiles.load

    def noting(self: TensorFiles, name: str) -> torch.Tensor:
        read.append(name)
        return load(self, name)

    monkeypatch.setattr(TensorFiles, "load", noting)
    checkpoint.packed("blocks.0.up")
    assert read == [f"blocks.0.up.{part}" for part in ("qweight", "qzeros", "scales")]


def test_a_name_that_is_no_linear(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_raw(tmp_path))
    for call in (checkpoint.packed, checkpoint.bias, checkpoint.outliers, checkpoint.shape, checkpoint.tensor):
        with pytest.raises(CheckpointError, match="nowhere"):
            call("nowhere")


def golden_models(shared_data: Path) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = json.loads((shared_data / "golden" / "cases.json").read_text())["models"]
    return models


def test_folders_that_autoawq_saved(shared_data: Path) -> None:
    for case in golden_models(shared_data):
        folder = shared_data / "golden" / "models" / case["name"]
        checkpoint = open_checkpoint(folder)
        stored = load_file(folder / "model.safetensors")
        assert len(checkpoint.linears) == case["quantized_linears"], case["name"]
        assert (checkpoint.quant.layout, checkpoint.quant.group_size) == (case["version"], case["group_size"])
        assert [f"{name}.scales" for name in checkpoint.act_scales] == case["act_scales"]
        held = set(checkpoint.float_names) | set(case["act_scales"])
        for name in checkpoint.linears:
            again = to_layout(case["version"], checkpoint.packed(name))
            for part, tensor in again.items():
                assert torch.equal(tensor, stored[f"{name}.{part}"]), (case["name"], name, part)
            bias = checkpoint.bias(name)
            held |= {f"{name}.{part}" for part in again} | ({f"{name}.bias"} if bias is not None else set())
        assert held == set(stored)


def test_gemv_and_gemm_of_one_model_hold_the_same_codes(shared_data: Path) -> None:
    models = shared_data / "golden" / "models"
    gemm, gemv = (open_checkpoint(models / f"llama_{layout}_g64") for layout in ("gemm", "gemv"))
    assert gemm.linears == gemv.linears
    for name in gemm.linears:
        assert equal(gemm.packed(name), gemv.packed(name)), name


@pytest.mark.parametrize("age", ["0.1.6", "0.1.8"])
def test_configurations_of_old_releases(shared_data: Path, tmp_path: Path, age: str) -> None:
    old = shared_data / "golden" / "models" / "legacy_configs" / age
    layers = random_packed(128, 16, 128)
    save_file({f"a.{part}": t for part, t in to_layout("gemm", layers).items()}, tmp_path / "model.safetensors")
    configs: list[dict[str, Any]] = [json.loads((old / "quantization_config_in_config_json.json").read_text()), {}]
    for config in configs:
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "quant_config.json").write_text((old / "quant_config.json").read_text())
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.quant.group_size == 128 and checkpoint.quant.zero_point
        assert equal(checkpoint.packed("a"), layers)


def test_settings_of_newer_tools_carry_extra_keys(tmp_path: Path) -> None:
    extra = {"format": "gemm", "checkpoint_format": "gemm", "sym": False, "desc_act": False, "provider": "auto-round"}
    assert open_checkpoint(write_raw(tmp_path, settings=SETTINGS | extra)).linears == ["a.b"]
