from typing import Any

import pytest

from awq.config import QuantConfig, canonical_version
from awq.errors import ConfigError


def test_both_spellings() -> None:
    old = QuantConfig.from_dict({"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})
    assert old == QuantConfig.from_dict({"zero_point": True, "group_size": 64, "bits": 4, "version": "GEMM"})
    assert QuantConfig.from_dict(old.to_dict()) == old


@pytest.mark.parametrize("settings", [None, {}, {"quant_method": "awq"}, {"modules_to_not_convert": None}])
def test_nothing_given_means_the_defaults(settings: Any) -> None:
    config = QuantConfig.from_dict(settings)
    assert (config.bits, config.group_size, config.zero_point, config.version) == (4, None, True, "GEMM")


def test_one_excluded_name_is_not_its_letters() -> None:
    assert QuantConfig.from_dict({"modules_to_not_convert": "k_proj"}).modules_to_not_convert == ("k_proj",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5"),
        ({"w_bit": "4"}, "bits='4'"),
        ({"group_size": 100}, "group_size=100"),
        ({"outlier_ratio": 0.06}, "outlier_ratio=0.06 is out of range"),
        ({"outlier_ratio": -1}, "out of range"),
        ({"outlier_ratio": "x"}, "out of range"),
        ({"effort": "most"}, "effort='most' is not known: use fast, balanced or max"),
        ({"effort": 1}, "effort=1"),
        ([1], "no dictionary"),
        ({"version": "exllama"}, "unknown kernel version 'exllama'"),
        ({"version": None, "grup_size": 1}, "unknown setting 'grup_size'"),
        ({"bits": 4, "w_bit": 3}, "twice"),
        ({"quant_method": "gptq"}, "not AWQ"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("name", "version"),
    [("GEMM", "GEMM"), ("gemv", "GEMV"), ("gemv_fast", "GEMV"), ("GEMV-fast", "GEMV"), ("Marlin", "GEMM")],
)
def test_versions_in_any_spelling(name: str, version: str) -> None:
    assert canonical_version(name) == version
