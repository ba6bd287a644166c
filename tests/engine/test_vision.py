"""Models that see: pictures go through the prefill, what follows through the engine, with transformers' tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.architectures.vision import VISION, Vision, tiny_vision
from tests.engine.both import WAYS, engined
from tests.tiny import random_tokens

SETTINGS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.filterwarnings("ignore:.*hidden_state.* is deprecated.*:FutureWarning")  # transformers' own call
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vision", VISION, ids=str)
def test_a_picture_and_words(vision: Vision, way: str) -> None:
    if str(vision) == "Mllama" and way == "stepping":
        pytest.skip("its cross attention has no slots to step by: a GPU launches it plainly")
    model = engined(tiny_vision(vision), way)
    for inputs in (vision.inputs(), {"input_ids": random_tokens(1, 9) % 60 + 1}):
        ours = model.generate(**inputs, **SETTINGS)
        ways, model.engine.ways.ways = model.engine.ways.ways, []
        theirs = model.generate(**inputs, **SETTINGS)
        model.engine.ways.ways = ways
        assert torch.equal(ours, theirs)
