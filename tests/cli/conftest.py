"""A tiny model folder and its quantized checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from awq.config import QuantConfig
from awq.pipeline.recipe import quantize_folder
from tests.tiny import save_tiny

CONFIG = QuantConfig(group_size=32, outlier_ratio=0.05, effort="fast")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("float") / "tiny")


@pytest.fixture(scope="session")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "tiny-awq"
    options = {"calibration": ["prose"], "samples": 4, "seq_len": 64, "device": "cpu", "progress": False}
    return quantize_folder(tiny, target, CONFIG, **options).path  # type: ignore[arg-type]
