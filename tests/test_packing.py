"""Packing: a plain reference, every layout, and files that AutoAWQ itself packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from awq.errors import CheckpointError, ConfigError
from awq.packing import LAYOUTS, PackedInt4, from_layout, pack, stored_shape, to_layout


def random_weight(in_features: int, out_features: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    codes = torch.randint(0, 16, (out_features, in_features), generator=random, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (out_features, groups), generator=random, dtype=torch.uint8)
    scales = torch.exp(torch.empty(out_features, groups).uniform_(-7, -1, generator=random)).half()
    return codes, zeros, scales


def same(left: PackedInt4, right: PackedInt4) -> bool:
    pairs = ((left.qweight, right.qweight), (left.qzeros, right.qzeros), (left.scales, right.scales))
    return all(torch.equal(a, b) for a, b in pairs)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.numpy().tobytes() == right.numpy().tobytes()


def test_channels_0_to_7_pack_to_the_published_word() -> None:
    packed = pack(torch.arange(8).repeat(16, 1).t(), torch.arange(8)[:, None], torch.ones(8, 1))
    assert packed.qweight.unique().tolist() == [0x75316420]
    assert packed.qzeros.tolist() == [[0x75316420]]


def test_gemv_packs_inputs_in_order() -> None:
    packed = pack((torch.arange(32) % 16).repeat(8, 1), torch.full((8, 1), 5), torch.ones(8, 1))
    stored = to_layout("gemv", packed)
    low, high = 0x76543210, 0xFEDCBA98 - 2**32
    assert stored["qweight"].tolist() == [[low, high, low, high]] * 8
    assert stored["qzeros"].tolist() == [[5, 0, 0, 0]] * 8  # one group of 32, padded to 32 groups
    assert stored["scales"].tolist() == [[1.0] + [0.0] * 31] * 8


def test_gemv_fast_interleaves_four_rows() -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    codes[2, :8] = torch.arange(1, 9)  # the third row goes to the words 32..47 of its block of 64
    stored = to_layout("gemv_fast", pack(codes, torch.full((8, 1), 3), torch.full((8, 1), 0.5)))
    row = stored["qweight"][0]
    # Channel 8i + 2j + t lies at 8j + 4t + i, so that channels 0..7 are 8 nibbles apart by pairs and 4 within.
    assert row.nonzero().flatten().tolist() == list(range(32, 40))
    assert row[32:40].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert stored["qzeros"][0].tolist() == [-1.5] * 8
    assert stored["qzeros"][1:].abs().max() == 0


def test_pack_and_unpack_are_inverse_and_dequantize_is_the_definition() -> None:
    codes, zeros, scales = random_weight(48, 24, 16)
    packed = pack(codes, zeros, scales)
    assert torch.equal(packed.codes(), codes) and torch.equal(packed.zeros(), zeros)
    assert (packed.in_features, packed.out_features, packed.group_size) == (48, 24, 16)
    for n, k in ((0, 0), (23, 47), (7, 17)):
        expected = (int(codes[n, k]) - int(zeros[n, k // 16])) * scales[n, k // 16].float()
        assert packed.dequantize()[n, k] == expected


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    groups=st.integers(1, 20),
    columns=st.integers(1, 6),
    group_size=st.sampled_from((32, 64, 128)),
    seed=st.integers(0, 2**31),
)
def test_every_layout_round_trips(layout: str, groups: int, columns: int, group_size: int, seed: int) -> None:
    in_features = groups * group_size
    if layout == "gemv_fast" and in_features % 64:
        in_features *= 2
    packed = pack(*random_weight(in_features, 8 * columns, group_size, seed))
    stored = to_layout(layout, packed)
    outlines = {name: tensor.to("meta") for name, tensor in stored.items()}
    shape = stored_shape(outlines)  # recognized from the shapes alone
    assert (shape.layout, shape.in_features, shape.out_features) == (layout, in_features, 8 * columns)
    assert shape.group_size == group_size
    assert same(from_layout(stored), packed) and same(from_layout(stored, group_size), packed)


@settings(max_examples=30, deadline=None)
@given(in_features=st.integers(1, 70), columns=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_gemm_round_trips_any_width(in_features: int, columns: int, seed: int) -> None:
    sizes = [size for size in range(2, in_features + 1) if in_features % size == 0]
    for group_size in sizes:
        codes, zeros, scales = random_weight(in_features, 8 * columns, group_size, seed)
        packed = pack(codes, zeros, scales)
        assert same(from_layout(to_layout("gemm", packed), group_size), packed)
        assert torch.equal(packed.codes(), codes) and torch.equal(packed.zeros(), zeros)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_rows_as_one_group(layout: str) -> None:
    packed = pack(*random_weight(384, 16, 384))
    assert same(from_layout(to_layout(layout, packed), -1), packed)


def test_strided_input_packs_the_same() -> None:
    codes, zeros, scales = random_weight(64, 16, 32)
    strided = [torch.stack((tensor, tensor), dim=-1)[..., 0] for tensor in (codes, zeros, scales)]
    assert same(pack(*strided), pack(codes, zeros, scales))


def test_scaled_zeros_survive_tiny_and_zero_scales() -> None:
    codes, zeros, scales = random_weight(64, 8, 32)
    scales[0], scales[1] = 2.0**-24, 6e-7  # float16 subnormals
    scales[2] = 0
    zeros[2] = 0
    packed = pack(codes, zeros, scales)
    assert same(from_layout(to_layout("gemv_fast", packed)), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_wider_scales_are_rounded_to_float16(dtype: torch.dtype) -> None:
    stored = to_layout("gemm", pack(*random_weight(64, 8, 32)))
    scales = stored["scales"].to(dtype)
    assert torch.equal(from_layout(stored | {"scales": scales}).scales, scales.half())


@pytest.mark.parametrize(
    ("in_features", "group_size", "layout", "reason"),
    [
        (64, 16, "gemv", "no groups of 16"),
        (96, 32, "gemv_fast", "multiple of 64"),
        (64, 32, "marlin", "unknown layout"),
    ],
)
def test_what_a_layout_cannot_hold(in_features: int, group_size: int, layout: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        to_layout(layout, pack(*random_weight(in_features, 8, group_size)))


@pytest.mark.parametrize(
    ("part", "change", "group_size", "reason"),
    [
        ("qweight", lambda t: t.long(), 32, "qweight is int64"),
        ("qweight", lambda t: t[:-1], 32, "in_features 63 is not a whole number of groups of 32"),
        ("qweight", lambda t: t[0], 32, "not matrices"),
        ("qweight", lambda t: t[:0], None, "in_features 0"),
        ("scales", lambda t: t[:, :-1], 32, r"scales is float16 \[2, 15\]"),
        ("scales", lambda t: t.int(), 32, "scales is int32"),
        ("qzeros", lambda t: t.half(), 32, "qzeros is float16"),
        ("scales", lambda t: t, 64, "groups of 64"),
        ("scales", lambda t: t, -1, "groups of 64"),
        ("scales", lambda t: t[:0], None, "whole number of groups|groups of 64"),
    ],
)
def test_tensors_that_fit_no_layout(part: str, change, group_size: int | None, reason: str) -> None:  # type: ignore[no-untyped-def]
    stored = to_layout("gemm", pack(*random_weight(64, 16, 32)))
    with pytest.raises(CheckpointError, match=reason):
        from_layout(stored | {part: change(stored[part])}, group_size)


def test_scaled_zeros_that_belong_to_other_scales() -> None:
    stored = to_layout("gemv_fast", pack(*random_weight(64, 8, 32)))
    with pytest.raises(CheckpointError, match="whole multiples"):
        from_layout(stored | {"scales": stored["scales"] * 0.7})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_file_that_autoawq_packed(shared_data: Path, layout: str) -> None:
    golden = shared_data / "golden"
    truth = load_file(golden / "linear" / "codes.safetensors")
    stored = load_file(golden / "linear" / f"{layout}.safetensors")
    cases = [case for case in json.loads((golden / "cases.json").read_text())["linear"] if case["version"] == layout]
    assert cases
    for case in cases:
        name = case["name"]
        codes, zeros, scales = (truth[case["codes"][part]] for part in "qzs")
        theirs = {part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        ours = to_layout(layout, pack(codes, zeros, scales))
        assert all(same_bytes(ours[part], theirs[part]) for part in theirs), name
        read = from_layout(theirs, case["group_size"])
        assert torch.equal(read.codes(), codes) and torch.equal(read.zeros(), zeros), name
        assert torch.equal(read.scales, scales.t()), name


def test_dequantized_as_autoawq_does(shared_data: Path) -> None:
    golden = shared_data / "golden" / "linear"
    stored, expected = load_file(golden / "gemm.safetensors"), load_file(golden / "dequantized.safetensors")
    for name, dtype in (("k128_n64_g32", torch.float32), ("k128_n64_g32", torch.float16)):
        packed = from_layout({part: stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")})
        key = f"{name}.dequantize_gemm_fp{32 if dtype == torch.float32 else 16}"
        assert torch.equal(packed.dequantize(dtype).t(), expected[key])
