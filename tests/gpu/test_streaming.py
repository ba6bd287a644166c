"""From disk through a GPU: the bytes of a run in memory, after an interruption and with little room too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from awq.algorithm.blocks import BlockLoop
from awq.algorithm.inputs.activations import Activations, Room
from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.pipeline import job
from awq.pipeline.memory import Place
from awq.pipeline.recipe import quantize_folder, quantize_model
from tests.checkpoint.small import digests
from tests.tiny import random_tokens, save_tiny, tiny_llama

pytestmark = pytest.mark.gpu
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "attention_bias": True}
EFFORTS = ("fast", "balanced", "max")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("float"), tiny_llama(**WIDE), torch.bfloat16)


def run(source: Path, output: Path, effort: str, **more: Any) -> dict[str, str]:
    config = QuantConfig(group_size=64, outlier_ratio=0.03, effort=effort)
    small: dict[str, Any] = {"calibration": ["prose"], "samples": 40, "seq_len": 128, "device": "cuda"}
    return digests(quantize_folder(source, output, config, progress=False, **small | more).path)


@pytest.mark.parametrize("effort", EFFORTS)
def test_from_disk_and_in_memory(source: Path, tmp_path: Path, effort: str) -> None:
    assert run(source, tmp_path / "parts", effort) == run(source, tmp_path / "whole", effort, whole=True)


@pytest.mark.parametrize("effort", EFFORTS)
def test_interrupted_it_goes_on_to_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    whole, solve = run(source, tmp_path / "whole", effort), BlockLoop._solve

    def ending(self: BlockLoop, block: Any, index: int, stored_in: torch.dtype) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return solve(self, block, index, stored_in)

    with monkeypatch.context() as patch:
        patch.setattr(BlockLoop, "_solve", ending)
        with pytest.raises(KeyboardInterrupt, match="2 of 4 blocks are kept"):
            run(source, tmp_path / "parts", effort)
    assert run(source, tmp_path / "parts", effort) == whole


@pytest.mark.parametrize("rooms", [(0, 0), (0, 1 << 40), (5_000_000, 5_000_000)])
def test_rooms_change_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rooms: tuple[int, int]
) -> None:
    whole = run(source, tmp_path / "whole", "balanced")

    def small(_blocks: Any, _config: Any, _tokens: Any, place: Place) -> Activations:
        return Activations(Room(rooms[0]), Room(rooms[1]), place.spill)

    monkeypatch.setattr(job, "plan_activations", small)
    assert run(source, tmp_path / "small", "balanced") == whole


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_two_gpus_it_is_quantized_and_still_runs() -> None:
    config, text = QuantConfig(group_size=64), CalibrationSet(random_tokens(16, 128), ("random tokens",))
    alone, spread = tiny_llama(**WIDE).cuda(), tiny_llama(**WIDE)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": index // 2 for index in range(4)}
    spread = dispatch_model(spread, places)
    reports = [quantize_model(model, config, text, device="cuda", progress=False) for model in (alone, spread)]
    assert reports[0]["linears"] == reports[1]["linears"]
    tokens = random_tokens(2, 24, seed=5).cuda()
    with torch.no_grad():
        logits = [model(input_ids=tokens).logits.cpu() for model in (alone, spread)]
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-3)
