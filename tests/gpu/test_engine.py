"""The engine on an NVIDIA GPU: graphs give transformers' tokens, and memory comes back."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awq.bench.models import random_model
from awq.engine import attach
from awq.engine.choose import choose
from awq.errors import OutOfMemoryError
from awq.storage.load import load_quantized
from awq.storage.save import save_quantized
from tests.architectures.families import FAMILIES, Family, tiny
from tests.engine.test_generate import (  # noqa: F401 - the same tests, of the pair below
    test_a_conversation_goes_on_with_its_cache,
    test_a_sequence_that_ends_is_padded_while_others_go_on,
    test_a_streamer_gets_what_it_gets_from_transformers,
    test_batches_and_lengths_change_from_call_to_call,
    test_criteria_of_the_caller,
    test_every_length_of_a_prompt,
    test_greedy_tokens_are_those_of_transformers,
    test_padding_that_is_not_on_the_left,
    test_prompts_that_transformers_pads_by_itself,
    test_stop_strings,
    test_text_streamers,
    test_the_cache_grows_on_the_way,
    test_what_is_left_to_transformers,
)
from tests.engine.ties import largest_gap
from tests.gpu.test_journey import quantized
from tests.tiny import byte_tokenizer, random_tokens, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # by what transformers compiles
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # and captures
]
SETTINGS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "pad_token_id": 0, "eos_token_id": None}


class Moving:
    """A model on the GPU that takes and gives tensors of the CPU."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, *arguments: Any, **more: Any) -> Any:
        given = [value.cuda() if isinstance(value, Tensor) else value for value in arguments]
        named = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in more.items()}
        found = self.model.generate(*given, **named)
        if isinstance(found, Tensor):
            return found.cpu()
        found.sequences = found.sequences.cpu()
        return found


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """float32, in which a tie is rare."""
    model = attach(tiny_llama().cuda())
    assert model.engine.ways.ways[0].captured, model.engine
    assert model.engine.ways.padded_prompts
    return Moving(model), Moving(tiny_llama().cuda())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.model_class()], ids=str)
def test_families(family: Family, record_property: Any) -> None:
    """Each is captured, or says what is in the way; the family that most models are is captured."""
    ways = choose(tiny(family).cuda())
    record_property("engine", ways.reason)
    torch.cuda.synchronize()
    if family.name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        assert ways.ways[0].captured, ways
    assert torch.ones(1, device="cuda").item() == 1  # a capture that failed leaves the device as it was


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_quantized_tokens_are_the_models_own(dtype: torch.dtype, batch: int) -> None:
    model = random_model(tiny_llama().config, torch.device("cuda"), dtype=dtype, outlier_ratio=0.02)
    assert model.engine.ways.ways[0].captured, model.engine
    for _ in range(3):  # plainly, recorded, replayed
        tokens = model.generate(random_tokens(batch, 9).cuda(), **SETTINGS)
        for row in tokens:
            gap, _, size = largest_gap(model, row[None], 9)
            assert gap <= max(1e-2, 4 * torch.finfo(dtype).eps * abs(size))


def test_graphs_are_recorded_once() -> None:
    model = attach(tiny_llama().cuda())
    for _ in range(3):
        model.generate(random_tokens(1, 9).cuda(), **SETTINGS)
    count = len(model.engine._cache.graphs)
    assert count == 2  # a prompt's and a step's
    model.generate(random_tokens(1, 12).cuda(), **SETTINGS)
    assert len(model.engine._cache.graphs) == count


def test_memory_comes_back_with_the_model() -> None:
    def use() -> None:
        model = random_model(tiny_llama().config, torch.device("cuda"))
        for batch in (1, 4):
            for _ in range(3):
                model.generate(random_tokens(batch, 9).cuda(), **SETTINGS)

    use()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        use()
    gc.collect()
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_two_models_in_two_threads() -> None:
    models = [attach(tiny_llama(seed).cuda()) for seed in (0, 1)]
    prompts = [random_tokens(1, 5 + 3 * i, seed=i).cuda() for i in range(4)]
    plain = [tiny_llama(seed).cuda() for seed in (0, 1)]
    expected = [[model.generate(prompt, **SETTINGS) for prompt in prompts] for model in plain]
    found: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()

    def talk(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for prompt in prompts * 3:
                found[which].append(models[which].generate(prompt, **SETTINGS))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=talk, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert all(torch.equal(*both) for both in zip(found[which], expected[which] * 3, strict=True))


def test_after_an_error_in_the_middle() -> None:
    model = attach(tiny_llama().cuda())
    expected = model.generate(random_tokens(1, 9).cuda(), **SETTINGS)

    class Broken:
        def put(self, value: Tensor) -> None:
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self) -> None: ...

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model.generate(random_tokens(1, 9).cuda(), streamer=Broken(), **SETTINGS)
        assert torch.equal(model.generate(random_tokens(1, 9).cuda(), **SETTINGS), expected)


def test_more_than_memory_holds_says_what_fits() -> None:
    model = attach(tiny_llama(max_position_embeddings=2**40).cuda())
    with pytest.raises(OutOfMemoryError, match="tokens a sequence fit"):
        model.generate(random_tokens(2000, 3000).cuda(), **SETTINGS | {"max_new_tokens": 2000})
    assert model.generate(random_tokens(1, 9).cuda(), **SETTINGS).shape == (1, 49)


PLACES = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.norm": 0, "lm_head": 0}


@pytest.mark.parametrize("place", ["cpu", "disk", 1])
def test_parts_elsewhere(tmp_path: Path, place: Any) -> None:
    """On a second GPU where there is one; kept in memory or on disk, and run on the first."""
    if place == 1 and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    model, report = quantized("cuda")
    save_quantized(model, tmp_path / "awq", report, tokenizer=byte_tokenizer())
    whole = load_quantized(tmp_path / "awq", device="cuda")
    parts = load_quantized(tmp_path / "awq", device_map=PLACES | {"model.layers.1": place})
    prompt = random_tokens(2, 12).cuda()
    settings = SETTINGS | {"max_new_tokens": 12}
    assert torch.equal(parts.generate(prompt, **settings), whole.generate(prompt, **settings))
    assert "no CUDA graph (the model is spread over" in str(parts.engine)
