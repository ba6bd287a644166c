"""Conversion: any readable folder becomes a gemm folder with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from awq.checkpoint import open_checkpoint
from awq.errors import CheckpointError, OutputExistsError
from awq.packing import LAYOUTS, to_layout
from awq.storage.convert import convert_checkpoint
from tests.checkpoint.small import (
    digests,
    equal,
    random_packed,
    raw_tensors,
    same_contents,
    small_linears,
    write_raw,
    write_small,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_becomes_gemm(tmp_path: Path, layout: str) -> None:
    tensors = raw_tensors(layout) | {"a.act.scales": torch.rand(16).half(), "a.b.bias": torch.rand(16).half()}
    source = write_raw(tmp_path / "in", tensors, {"version": layout})
    convert_checkpoint(source, tmp_path / "out")
    converted = open_checkpoint(tmp_path / "out")
    assert (converted.quant.layout, converted.quant.group_size) == ("gemm", 32)
    assert equal(converted.packed("a.b"), random_packed())
    assert torch.equal(converted.act_scales["a.act"], tensors["a.act.scales"])
    assert torch.equal(converted.tensor("embed.weight"), tensors["embed.weight"])
    assert converted.bias("a.b") is not None and converted.report == {"converted_from": layout}


def test_ours_is_unchanged(tmp_path: Path) -> None:
    write_small(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    assert same_contents(open_checkpoint(tmp_path / "out"), small_linears())
    assert (tmp_path / "out" / "awq_report.json").read_bytes() == (tmp_path / "in" / "awq_report.json").read_bytes()


def test_tokenizer_travels_and_code_does_not(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "in")
    kept = ["tokenizer.json", "tokenizer.model", "vocab.txt", "chat_template.jinja", "templates/tool.jinja", "LICENSE"]
    left = ["modeling_x.py", "pytorch_model.bin", "quant_config.json", "x.pkl", "model.safetensors.index.json"]
    (source / "templates").mkdir()
    for name in (*kept, *left):
        (source / name).write_text("{}")
    written = convert_checkpoint(source, tmp_path / "out")
    assert set(digests(tmp_path / "out")) == {*kept, "config.json", "model.safetensors", "awq_report.json"}
    assert any("modeling_x.py" in warning and "code is never taken along" in warning for warning in written.warnings)


def test_tokenizer_that_links_outside_is_refused(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "in")
    (tmp_path / "secret.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_substrings_become_full_prefixes(tmp_path: Path) -> None:
    tensors = {f"m.gate_proj.{part}": tensor for part, tensor in to_layout("gemm", random_packed()).items()}
    tensors |= {"m.gate.weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2, 2)}
    source = write_raw(tmp_path / "in", tensors, {"modules_to_not_convert": ["head", "nothing"]})
    convert_checkpoint(source, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").quant.modules_to_not_convert == ("lm_head",)


def test_whole_rows_of_an_unusual_width(tmp_path: Path) -> None:
    tensors = {f"a.{part}": tensor for part, tensor in to_layout("gemm", random_packed(256, 8, 256)).items()}
    convert_checkpoint(write_raw(tmp_path / "in", tensors, {"group_size": 256}), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").quant.group_size == -1
    tensors = {f"a.{part}": tensor for part, tensor in to_layout("gemm", random_packed(512, 8, 256)).items()}
    with pytest.raises(CheckpointError, match="groups of 256"):
        convert_checkpoint(write_raw(tmp_path / "in", tensors, {"group_size": 256}), tmp_path / "other")


def test_output_is_checked_first(tmp_path: Path) -> None:
    write_raw(tmp_path / "in")
    with pytest.raises(OutputExistsError):
        convert_checkpoint(tmp_path / "absent", tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "in", overwrite=True)
    assert equal(open_checkpoint(tmp_path / "in").packed("a.b"), random_packed())


def test_golden_models(shared_data: Path, tmp_path: Path) -> None:
    for name in ("llama_gemv_g64", "gpt_neox_gemm_g32", "llama_legacy_018", "llama_gemm_g64"):
        source = open_checkpoint(shared_data / "golden" / "models" / name)
        convert_checkpoint(source.path, tmp_path / name)
        converted = open_checkpoint(tmp_path / name)
        assert converted.linears == source.linears and converted.float_names == source.float_names
        assert all(equal(converted.packed(linear), source.packed(linear)) for linear in source.linears)
        assert list(converted.act_scales) == list(source.act_scales)
        before, after = ({**json.loads((path / "config.json").read_text())} for path in (source.path, tmp_path / name))
        del before["quantization_config"], after["quantization_config"]
        assert before == after
