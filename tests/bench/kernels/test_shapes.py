import pytest
import torch

from awq.bench.kernels.shapes import MODELS, SWEEP, Setting, Shape, default_shapes, find_shapes
from awq.errors import ConfigError

SHAPE = Shape(64, 128)
HALF = torch.float16


@pytest.mark.parametrize("text", ["64x128", "64X128"])
def test_shape(text: str) -> None:
    assert Shape.parse(text) == SHAPE
    assert str(SHAPE) == "64x128"


@pytest.mark.parametrize("text", ["", "64", "64x", "64x128x2", "axb", "12x64", "0x64", "-8x64", "64x0", "64.0x64"])
def test_wrong_shapes(text: str) -> None:
    with pytest.raises(ConfigError, match="shape"):
        Shape.parse(text)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_default_shapes_can_be_packed(device: str) -> None:
    assert all(Shape.parse(str(shape)) == shape for shape in default_shapes(torch.device(device)))


def test_models_and_shapes_mix() -> None:
    found = find_shapes(["64x128", "Llama-2-7B", "4096x4096"])
    assert found == [SHAPE, Shape(12288, 4096), Shape(4096, 4096), Shape(22016, 4096), Shape(4096, 11008)]
    with pytest.raises(ConfigError, match="llama-3-70b"):
        find_shapes(["llama-4"])


def test_models_fuse_what_an_engine_fuses() -> None:
    for name, ((qkv, width), o, (gate_up, _), down) in MODELS.items():
        assert o == (width, width), name
        assert qkv > width and down == (width, gate_up // 2), name


def test_the_sweep_has_30_other_shapes_that_pack() -> None:
    assert len(set(SWEEP)) == len(SWEEP) == 30
    ours = {Shape(*sizes) for name in ("llama-2-7b", "llama-3-70b") for sizes in MODELS[name]}
    assert not ours & set(SWEEP)
    assert all(Setting(Shape.parse(str(shape)), 128, HALF) for shape in SWEEP)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting(SHAPE, 64, HALF), 64 * 128 // 2 + 64 * 2 * 2 + 64 * 2 // 2),
        (Setting(SHAPE, 64, HALF, zero_point=False), 64 * 128 // 2 + 64 * 2 * 2),
        (Setting(SHAPE, -1, HALF), 64 * 128 // 2 + 64 * 2 + 64 // 2),
        (Setting(SHAPE, 64, HALF, outlier_ratio=0.02), 64 * 128 // 2 + 64 * 2 * 2 + 64 * 2 // 2 + 3 * (2 * 64 + 4)),
    ],
)
def test_bytes(setting: Setting, expected: int) -> None:
    assert setting.weight_bytes == expected
    assert setting.call_bytes(3) == expected + 3 * 2 * (64 + 128)


def test_bytes_of_a_big_linear_are_those_of_the_tables() -> None:
    bytes_of = Setting(Shape(12288, 4096), 128, HALF).call_bytes(1)
    assert bytes_of == pytest.approx(26.15e6, rel=0.003)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"group_size": 48}, "group size 48 does not divide the K of 64x128"),
        ({"group_size": 0}, "group size 0"),
        ({"dtype": torch.float32}, "half precision"),
        ({"outlier_ratio": 0.5}, "outlier_ratio 0.5"),
        ({"outlier_ratio": -0.1}, "outlier_ratio -0.1"),
    ],
)
def test_settings_that_mean_nothing(arguments: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Setting(**{"shape": SHAPE, "group_size": 64, "dtype": HALF} | arguments)  # type: ignore[arg-type]


def test_a_whole_row_is_a_group() -> None:
    assert Setting(SHAPE, -1, HALF).group_size == 128
