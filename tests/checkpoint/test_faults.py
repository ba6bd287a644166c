"""Hostile, damaged and foreign folders: one sentence each, and never a crash."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from awq.checkpoint import Checkpoint, open_checkpoint
from awq.errors import AwqError, CheckpointError, ModelNotFoundError
from tests.checkpoint.small import CONFIG, SETTINGS, raw_tensors, write_raw, write_small

Change = Callable[[Path], object]


def configured(**changes: object) -> Change:
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(CONFIG | {"quantization_config": SETTINGS | changes})
    )


def stored(**changes: Tensor | None) -> Change:
    """Replace or remove tensors of `a.b`."""

    def change(folder: Path) -> None:
        tensors: dict[str, Tensor | None] = {**raw_tensors()}
        tensors |= {f"a.b.{part}": tensor for part, tensor in changes.items()}
        write_raw(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})

    return change


def indexed(**places: str) -> Change:
    """Turn the folder into a sharded one whose index holds `places` as well."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        places_of_all = dict.fromkeys(raw_tensors(), "one.safetensors") | places
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places_of_all}))

    return change


def content(name: str, data: bytes | str) -> Change:
    raw = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / name).write_bytes(raw)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def symlink_outside(folder: Path) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def two_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({"x": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"
NO_SETTINGS = json.dumps(CONFIG)

WRONG: list[tuple[str, Change, str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "no config.json"),
    ("config is garbage", content("config.json", b"\xff\x00{"), "not readable JSON"),
    ("config is a list", content("config.json", "[1]"), "holds list, not a JSON object"),
    ("config is deep", content("config.json", "[" * 100_000), "not readable JSON"),
    ("not quantized", content("config.json", NO_SETTINGS), "is not quantized.*awq quantize"),
    ("settings no object", content("config.json", '{"quantization_config": [4]}'), "not a JSON object"),
    ("gptq", configured(quant_method="gptq"), "quantized with gptq"),
    ("compressed", configured(quant_method="compressed-tensors"), "quantized with compressed-tensors"),
    ("bitsandbytes", configured(quant_method="bitsandbytes"), "quantized with bitsandbytes"),
    ("8 bits", configured(bits=8), "stores 8-bit weights"),
    ("bits as text", configured(bits="4"), "stores '4'-bit"),
    ("marlin", configured(version="marlin"), "layout 'marlin'"),
    ("unknown version", configured(version="gemx"), "layout 'gemx'"),
    ("group size", configured(group_size=64), "a.b in .*groups of 64"),
    ("group size as text", configured(group_size="32"), "group_size '32'"),
    ("group size 0", configured(group_size=0), "group_size 0"),
    ("groups per row", configured(group_size=-1), "a.b in .*groups of 64"),
    ("modules as number", configured(modules_to_not_convert=3), "not a list of names"),
    ("modules without end", configured(modules_to_not_convert=["a"] * 70_000), "not a list of names"),
    ("modules of numbers", configured(modules_to_not_convert=[3]), "not a list of names"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "no safetensors file"),
    ("pickle only", only_pickle, "only as pickle.*convert it to safetensors"),
    ("truncated", cut, "truncated or damaged"),
    ("empty file", content("model.safetensors", b""), "truncated or damaged"),
    ("garbage", content("model.safetensors", bytes(range(256)) * 4), "truncated or damaged"),
    ("huge header", content("model.safetensors", HUGE_HEADER), "truncated or damaged"),
    ("LFS pointer", content("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    ("no plain file", pipe, "not a plain file"),
    ("two files, no index", two_files, "2 safetensors files but no model.safetensors.index.json"),
    ("symlink out", symlink_outside, "leads out of its folder"),
    ("index to parent", indexed(x="../one.safetensors"), "not a file of this folder"),
    ("index to ..", indexed(x=".."), "leads out of its folder"),
    ("index absolute", indexed(x="/etc/passwd"), "not a file of this folder"),
    ("index with a NUL", indexed(x="a\0b"), "not a file of this folder"),
    ("index with a surrogate", indexed(x="\ud800"), "not a file of this folder"),
    ("index too long", indexed(x="a" * 5000), "truncated or damaged|missing"),
    ("index to nothing", indexed(x="two.safetensors"), "two.safetensors is missing"),
    ("index to itself", indexed(x="."), "not a file of this folder"),
    ("index of a tensor not there", indexed(x="one.safetensors"), "lacks x"),
    ("no qweight at all", stored(qweight=None, qzeros=None, scales=None), "no quantized linear"),
    ("zeros alone", stored(qweight=None), "a.b.qzeros but no a.b.qweight"),
    ("scales alone", stored(qweight=None, qzeros=None), "no quantized linear|no a.b.qweight"),
    ("no zeros", stored(qzeros=None), "lacks a.b.qzeros"),
    ("no scales", stored(scales=None), "lacks a.b.scales"),
    ("gptq beside", stored(g_idx=torch.zeros(64, dtype=torch.int32)), "GPTQ"),
    ("weight of bytes", stored(qweight=torch.zeros(64, 2, dtype=torch.uint8)), "qweight is uint8"),
    ("weight too short", stored(qweight=torch.zeros(32, 2, dtype=torch.int32)), "a.b in .*: qzeros is"),
    ("weight of no rows", stored(qweight=torch.zeros(0, 2, dtype=torch.int32)), "a.b in "),
    ("weight of 3 dimensions", stored(qweight=torch.zeros(2, 2, 2, dtype=torch.int32)), "not matrices"),
    ("weight in float8", stored(qweight=torch.zeros(64, 2, dtype=torch.float8_e4m3fn)), "dtype F8_E4M3"),
    ("scales of integers", stored(scales=torch.zeros(2, 16, dtype=torch.int32)), "scales is int32"),
    ("bias too long", stored(bias=torch.zeros(17)), "a.b.bias in .*does not fit"),
    ("bias of integers", stored(bias=torch.zeros(16, dtype=torch.int32)), "a.b.bias in .*does not fit"),
    ("scales of another", stored(**{"other.scales": torch.zeros(2, 2)}), "no a.b.other.qweight"),
]


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_folders(tmp_path: Path, change: Change, sentence: str) -> None:
    folder = write_raw(tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(folder)


def test_old_gptq_folder_names_no_method(tmp_path: Path) -> None:
    write_raw(tmp_path)
    (tmp_path / "config.json").write_text(NO_SETTINGS)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    with pytest.raises(CheckpointError, match="gptq"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelNotFoundError, match="is not a folder"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.b.scales", lambda checkpoint: checkpoint.packed("a.b")),
        ("a.b.bias", lambda checkpoint: checkpoint.bias("a.b")),
        ("a.act.scales", lambda checkpoint: checkpoint.act_scales),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_their_tensor(
    tmp_path: Path, name: str, read: Callable[[Checkpoint], object], value: float
) -> None:
    tensors = raw_tensors() | {"a.b.bias": torch.zeros(16), "a.act.scales": torch.ones(8)}
    tensors[name].view(-1)[3] = value
    checkpoint = open_checkpoint(write_raw(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        read(checkpoint)


def test_scales_too_large_for_float16(tmp_path: Path) -> None:
    tensors = raw_tensors()
    tensors["a.b.scales"] = tensors["a.b.scales"].float() * 1e8
    checkpoint = open_checkpoint(write_raw(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"a.b.scales holds NaN or infinity"):
        checkpoint.packed("a.b")


def test_scaled_zeros_of_other_scales(tmp_path: Path) -> None:
    tensors = raw_tensors("gemv_fast")
    tensors["a.b.scales"] *= 0.7
    checkpoint = open_checkpoint(write_raw(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=r"a.b in .* whole multiples"):
        checkpoint.packed("a.b")


OUTLIERS: list[tuple[dict[str, Any], str]] = [
    ({"blocks.0.gate.idx": torch.tensor([5, 5, 6], dtype=torch.int32)}, "must ascend within 0..63"),
    ({"blocks.0.gate.idx": torch.tensor([5, 6, 64], dtype=torch.int32)}, "must ascend within 0..63"),
    ({"blocks.0.gate.idx": torch.tensor([-1, 6, 7], dtype=torch.int32)}, "must ascend within 0..63"),
    ({"blocks.0.gate.idx": torch.tensor([5, 6, 7])}, "torch.int64"),
    ({"blocks.0.gate.idx": torch.tensor([5, 6], dtype=torch.int32)}, "residual in .*does not fit"),
    ({"blocks.0.gate.idx": None}, "no tensor blocks.0.gate.idx"),
    ({"blocks.0.gate.residual": None}, "no tensor blocks.0.gate.residual"),
    ({"blocks.0.gate.residual": torch.zeros(3, 15).half()}, "does not fit"),
    ({"blocks.0.gate.residual": torch.zeros(3, 16)}, "torch.float32"),
    ({"blocks.0.gate.residual": torch.full((3, 16), torch.nan).half()}, "residual holds NaN"),
    ({"blocks.9.gate.residual": torch.zeros(3, 16).half()}, "belongs to no quantized linear"),
    ({"blocks.0.gate.scale": torch.zeros(3)}, "belongs to no quantized linear"),
    (
        {
            "blocks.0.gate.idx": torch.zeros(0, dtype=torch.int32),
            "blocks.0.gate.residual": torch.zeros(0, 16).half(),
        },
        "keeps 0 channels of 64",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), OUTLIERS)
def test_wrong_outliers(tmp_path: Path, changes: dict[str, Tensor | None], sentence: str) -> None:
    write_small(tmp_path / "out")
    path = tmp_path / "out" / "outliers" / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(tmp_path / "out").outliers("blocks.0.gate")


def test_outlier_folder_that_leads_away(tmp_path: Path) -> None:
    write_small(tmp_path / "out")
    (tmp_path / "out" / "outliers").rename(tmp_path / "outliers")
    (tmp_path / "out" / "outliers").symlink_to(tmp_path / "outliers")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_checkpoint(tmp_path / "out")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 900), value=st.integers(0, 255), length=st.integers(0, 2000))
def test_any_damaged_byte_or_length_is_a_sentence_or_harmless(
    tmp_path: Path, position: int, value: int, length: int
) -> None:
    folder = write_raw(tmp_path / "model")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data[: length or None])
    try:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.linears:
            checkpoint.packed(name)
    except AwqError:
        pass
