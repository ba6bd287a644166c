"""Several GPUs, each with a process of its own and NCCL between them: the bytes that one writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.several import run
from tests.test_processes import Case, assert_done, digests, quantize_all, save_models

pytestmark = pytest.mark.gpu
CASES: list[Case] = [(model, effort, 40) for model in ("dense", "experts") for effort in ("fast", "balanced", "max")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert_done(run(1, quantize_all, models, folder, CASES, "cuda", seconds=600))
    return folder


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_checkpoint_does_not_depend_on_the_number_of_gpus(
    models: Path, alone: Path, tmp_path: Path, size: int
) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    assert_done(run(size, quantize_all, models, tmp_path, CASES, "cuda", seconds=600))
    for checkpoint in sorted(tmp_path.iterdir()):
        assert digests(checkpoint) == digests(alone / checkpoint.name), checkpoint.name
