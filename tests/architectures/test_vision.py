"""Models that see: the language tower is quantized, everything else comes back bit by bit, and they see the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.quantizers.quantizers_utils import should_convert_module

from awq import AutoAWQForCausalLM
from awq.algorithm.inputs.capture import enter_model
from awq.checkpoint.read import open_checkpoint
from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet
from awq.pipeline.recipe import quantize_folder, quantize_model
from awq.pretrained.source import find_source, skeleton
from awq.storage.load import load_dequantized, load_quantized
from awq.storage.save import save_quantized
from awq.structure.blocks import find_blocks
from awq.structure.groups import fold
from tests.architectures.test_architectures import (
    TOKENS,
    distance,
    linear_names,
    logits,
    stored_names,
    structures,
)
from tests.architectures.vision import VISION, Vision, tiny_vision
from tests.tiny import byte_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no calibration token reached it.*"),  # blocks that look at images alone
    pytest.mark.filterwarnings("ignore:.*hidden_state.* is deprecated.*:FutureWarning"),  # transformers' own call
]
every_vision = pytest.mark.parametrize(
    "vision", [pytest.param(one, id=str(one), marks=() if one.core else pytest.mark.slow) for one in VISION]
)
OTHER = ("visual", "vision", "audio", "projector", "connector")  # in the names of what is not the language tower
TEXT = CalibrationSet(TOKENS, ("random tokens",))
PROCESSOR = {
    "preprocessor_config.json": '{"image_mean": [0.5]}',
    "chat_template.json": "{}",
    "processor_config.json": "{}",
}


def model_of(vision: Vision) -> Any:
    if vision.model_class() is None:
        pytest.skip(f"this transformers has no {vision.name}ForConditionalGeneration")
    return tiny_vision(vision)


def sight(model: Any, vision: Vision, seed: int = 0) -> Tensor:
    """Logits of text with an image (or a sound) in it."""
    with torch.no_grad():
        result: Tensor = model(**vision.inputs(seed)).logits
        return result


@every_vision
def test_the_groups_of_every_block_that_reads_text(vision: Vision) -> None:
    model = model_of(vision)
    assert find_blocks(model)[0] == find_blocks(skeleton(model.config))[0] == vision.blocks
    for index, (block, structure) in enumerate(structures(model)):
        found = {f"{group.producer} -> {', '.join(group.consumers)}" for group in structure.groups}
        assert found == (set() if index in vision.unread else set(vision.groups))
        read = {name for names in structure.input_sets for name in names}
        assert read == (set() if index in vision.unread else linear_names(block))


@every_vision
def test_entering_the_model_sees_what_the_blocks_see(vision: Vision) -> None:
    """Positions (of three axes, in some), masks and all: the calls noted in passing lead to what the model computes."""
    model = model_of(vision)
    _, blocks = find_blocks(model)
    seen: list[Tensor] = []
    handle = blocks[-1].register_forward_hook(
        lambda _block, _args, out: seen.append(out[0] if type(out) is tuple else out)
    )
    with torch.no_grad():
        logits(model)
        handle.remove()
        chunk = enter_model(model, blocks, TOKENS, torch.device("cpu"))[0]
        for index, block in enumerate(blocks):
            chunk.hidden = chunk.run(index, block, chunk.hidden)
    assert distance(chunk.hidden, seen[0]) < 1e-6


@every_vision
def test_folding_changes_nothing_that_is_seen(vision: Vision) -> None:
    model = model_of(vision)
    before = sight(model, vision)
    with torch.no_grad():
        for block, structure in structures(model):
            for group in structure.groups:
                channels = group.rows(block.get_submodule(group.producer).weight).shape[:2].numel()
                fold(block, group, torch.rand(channels) * 2 + 0.5)
    assert 0 < distance(sight(model, vision), before) < 1e-5


@every_vision
def test_saved_and_loaded_with_its_other_tower_as_it_was(vision: Vision, tmp_path: Path) -> None:
    model_of(vision).save_pretrained(tmp_path / "float")
    model = find_source(tmp_path / "float").load()
    assert isinstance(model, vision.model_class())
    linears = linear_names(find_blocks(model)[1])
    original, sees, blind = logits(model), sight(model, vision), sight(model, vision, seed=1)
    assert distance(blind, sees) > 0.01
    report = quantize_model(model, QuantConfig(group_size=32, outlier_ratio=0.03), TEXT, device="cpu", progress=False)
    assert set(report["linears"]) == {f"{vision.blocks}.{name}" for name in linears}
    save_quantized(model, tmp_path / "awq", report)
    assert stored_names(tmp_path / "awq") == stored_names(tmp_path / "float")
    assert_equal_outside(tmp_path)
    checkpoint = open_checkpoint(tmp_path / "awq")
    assert set((checkpoint.report or {})["linears"]) == set(checkpoint.linears)
    plain = load_dequantized(tmp_path / "awq")
    loaded = load_quantized(tmp_path / "awq", kernel="reference", device="cpu", dtype=torch.float32)
    for look in (logits, lambda seeing: sight(seeing, vision)):
        assert distance(look(loaded), look(plain)) < 1e-4
        assert distance(look(plain), look(model)) < 3e-3  # norms and embeddings are stored in float16
    assert 0 < distance(logits(plain), original) < 0.4
    assert 0 < distance(sight(plain, vision), sees) < 0.4


def assert_equal_outside(folder: Path) -> None:
    """Whatever is not of the language tower is stored as it was, float32 included."""
    before, after = tensors(folder / "float"), tensors(folder / "awq")
    other = [name for name in before if any(part in name for part in OTHER)]
    assert len(other) > 40
    for name in other:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name


def tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@every_vision
def test_other_engines_are_told_what_stays_float(vision: Vision, tmp_path: Path) -> None:
    """transformers goes by the names of its own modules, vLLM by parts of stored names."""
    model = model_of(vision)
    linears = linear_names(model)
    report = quantize_model(model, QuantConfig(group_size=32), TEXT, device="cpu", progress=False)
    save_quantized(model, tmp_path / "awq", report)
    kept = json.loads((tmp_path / "awq/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert len(kept) < 12  # whole towers, not hundreds of names
    for name in linears:
        assert should_convert_module(name, kept) is (name in report["linears"]), name
    for name in tensors(tmp_path / "awq"):
        module, _, part = name.rpartition(".")
        if part == "qweight":
            assert not any(word in module for word in kept)
        elif part == "weight" and any(tower in name for tower in ("visual", "vision", "audio")):
            assert any(word in module for word in kept)


@every_vision
@pytest.mark.filterwarnings("ignore:.*vLLM.*")
def test_the_way_of_a_user(vision: Vision, tmp_path: Path) -> None:
    """from_pretrained, quantize with text, save with the processor, from_quantized, generate about an image."""
    save_float(vision, tmp_path / "float")
    model = AutoAWQForCausalLM.from_pretrained(tmp_path / "float")
    model.tokenizer = byte_tokenizer()
    letters = TOKENS % 80 + 1
    model.quantize(quant_config={"q_group_size": 32}, calib_data=letters.tolist(), max_calib_seq_len=16)
    model.save_quantized(tmp_path / "awq")
    assert_answers(tmp_path / "awq", vision)


@pytest.mark.filterwarnings("ignore:.*vLLM.*")
def test_the_way_of_a_folder(tmp_path: Path) -> None:
    """The command line's: structure and settings are checked before the weights are read."""
    vision = next(one for one in VISION if one.core)
    save_float(vision, tmp_path / "float")
    byte_tokenizer().save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text("letters,digits,and-no-space-between-them" * 20)
    finished = quantize_folder(
        tmp_path / "float",
        tmp_path / "awq",
        QuantConfig(group_size=32),
        calibration=[tmp_path / "text.txt"],
        samples=8,
        seq_len=32,
        device="cpu",
        progress=False,
    )
    assert len(finished.report["linears"]) == 14
    assert_answers(tmp_path / "awq", vision)


def save_float(vision: Vision, folder: Path) -> None:
    model_of(vision).to(torch.bfloat16).save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(content)


def assert_answers(folder: Path, vision: Vision) -> None:
    """The processor lies there as it was, and the model says something to a picture and to words."""
    for name, content in PROCESSOR.items():
        assert (folder / name).read_text() == content
    loaded = AutoAWQForCausalLM.from_quantized(folder)
    assert isinstance(loaded.model, vision.model_class())
    for inputs in (vision.inputs(), {"input_ids": TOKENS[:1]}):
        answer = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert answer.shape[1] <= inputs["input_ids"].shape[1] + 3
