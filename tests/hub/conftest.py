from __future__ import annotations

from pathlib import Path

import pytest

from awq.pipeline.recipe import quantize_folder
from tests.cli.conftest import CONFIG
from tests.hub.fake import FakeHub
from tests.tiny import save_tiny

CARD = """---
language: en
license: other
license_name: "tiny-licence"
license_link: https://example.org/licence
---
# Tiny
license: not this one
"""


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tmp_path_factory.mktemp("float") / "tiny")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("Do as you like.")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quantized") / "tiny-awq"
    options = {"calibration": ["prose"], "samples": 4, "seq_len": 64, "device": "cpu", "progress": False}
    return quantize_folder(tiny_source, target, CONFIG, **options).path  # type: ignore[arg-type]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub()
    monkeypatch.setattr("awq.hub.upload.HfApi", hub)
    return hub
