import pytest

from awq.config import QuantConfig
from awq.errors import ConfigError
from awq.structure.plan import make_plan
from tests.tiny import tiny_llama


def test_every_linear_of_the_blocks_and_no_other() -> None:
    plan = make_plan(tiny_llama(), QuantConfig(group_size=32))
    assert plan.blocks == "model.layers"
    assert len(plan.linears) == 14
    assert plan.not_converted == {"lm_head": "outside the blocks"}


@pytest.mark.parametrize(("width", "expected"), [(128, 128), (192, 64), (96, 32)])
def test_default_group_size_is_the_largest_that_divides(width: int, expected: int) -> None:
    model = tiny_llama(hidden_size=width, intermediate_size=2 * width, head_dim=width // 4)
    plan = make_plan(model, QuantConfig())
    assert plan.config.group_size == expected
    assert len(plan.notes) == (expected != 128)
    assert all(str(expected) in note and f"{width} inputs" in note for note in plan.notes)


def test_an_explicit_group_size_that_does_not_divide_is_an_error_with_the_sizes_that_do() -> None:
    with pytest.raises(
        ConfigError, match=r"group size 128 does not divide the 64 inputs of model\.layers.*64, 32, 16 or -1"
    ):
        make_plan(tiny_llama(), QuantConfig(group_size=128))


def test_no_default_fits() -> None:
    with pytest.raises(ConfigError, match="nor does 64 or 32"):
        make_plan(tiny_llama(hidden_size=48, head_dim=12), QuantConfig())


def test_excluded_by_substrings_of_full_names() -> None:
    plan = make_plan(tiny_llama(), QuantConfig(group_size=32, modules_to_not_convert=("layers.0.mlp", "k_proj")))
    assert len(plan.linears) == 14 - 3 - 2
    assert plan.not_converted["model.layers.0.mlp.up_proj"] == "excluded by modules_to_not_convert"


def test_nothing_left() -> None:
    with pytest.raises(ConfigError, match=r"nothing is left .* excluded by modules_to_not_convert"):
        make_plan(tiny_llama(), QuantConfig(modules_to_not_convert=("model",)))


def test_outputs_that_do_not_fill_words() -> None:
    with pytest.raises(ConfigError, match=r"260 outputs|up_proj has 1002 outputs|gate_proj has 1002 outputs"):
        make_plan(tiny_llama(hidden_size=512, intermediate_size=1002, head_dim=128), QuantConfig(group_size=-1))
