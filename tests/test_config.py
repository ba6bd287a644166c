import json
from typing import Any

import numpy as np
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
        ({"zero_point": "no"}, "zero_point='no' is neither on nor off"),
        ({"scale": "x"}, "scale='x'"),
        ({"bits": True}, "bits=1"),
        ({"bits": 3.5}, "bits=3.5"),
        ({"bits": float("inf")}, "bits=inf"),
        ({"group_size": "64"}, "group_size='64'"),
        ({"modules_to_not_convert": 5}, "modules_to_not_convert=5 is no list"),
        ({"modules_to_not_convert": [5]}, "no list of names"),
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


def test_numbers_of_another_kind_are_stored_as_what_they_equal() -> None:
    given = QuantConfig.from_dict({"w_bit": 4.0, "q_group_size": np.int64(64), "zero_point": np.False_, "clip": 1})
    assert given == QuantConfig(bits=4, group_size=64, zero_point=False)
    assert json.loads(json.dumps(given.to_dict())) == {**given.to_dict(), "modules_to_not_convert": []}


@pytest.mark.parametrize(
    ("name", "version"),
    [("GEMM", "GEMM"), ("gemv", "GEMV"), ("gemv_fast", "GEMV"), ("GEMV-fast", "GEMV"), ("Marlin", "GEMM")],
)
def test_versions_in_any_spelling(name: str, version: str) -> None:
    assert canonical_version(name) == version
