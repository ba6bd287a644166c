"""Tiny random models that see or hear as well as read, their other tower larger than the one that is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.architectures.families import COMMON, GEMMA2, LLAMA

MEDIUM = 90  # the token in whose places an image or a sound is put
TEXT: dict[str, Any] = COMMON | {"tie_word_embeddings": False}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TOWER: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
QWEN_TOKENS: dict[str, Any] = {
    "image_token_id": MEDIUM,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Vision:
    """A class of transformers, tiny.

    groups: what is scaled in each block of the language tower; `unread`: blocks that text alone passes by
    medium: random pixels or sound and what belongs to them; `tokens`: in how many places they are put
    """

    name: str
    config: dict[str, Any]
    medium: Callable[[], dict[str, Tensor]]
    blocks: str = "model.language_model.layers"
    groups: tuple[str, ...] = LLAMA
    tokens: int = 4
    unread: tuple[int, ...] = ()
    core: bool = False

    def __str__(self) -> str:
        return self.name

    def model_class(self) -> Any:
        return getattr(transformers, f"{self.name}ForConditionalGeneration", None)

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Text with a random image or sound in it."""
        torch.manual_seed(seed)
        ids = torch.randint(1, 80, (1, 24), generator=torch.Generator().manual_seed(0))
        ids[0, 5 : 5 + self.tokens] = MEDIUM
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.medium()}


def square() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 16, 16)}


def patches() -> dict[str, Tensor]:
    kinds = torch.zeros(1, 24, dtype=torch.int64)
    kinds[0, 5:9] = 1
    grid = torch.tensor([[1, 4, 4]])
    return {"pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": grid, "mm_token_type_ids": kinds}


def sized() -> dict[str, Tensor]:
    return square() | {"image_sizes": torch.tensor([[16, 16]])}


def tiled() -> dict[str, Tensor]:
    ones = torch.ones(1, 1, 1, dtype=torch.int64)
    return {
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": ones[0],
        "aspect_ratio_mask": ones,
        "cross_attention_mask": torch.ones(1, 24, 1, 1),
    }


def sound() -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 16, 16), "feature_attention_mask": torch.ones(1, 16, dtype=torch.int64)}


def qwen_text(**changes: Any) -> dict[str, Any]:
    return TEXT | {"rope_parameters": MROPE | changes, "head_dim": 16}


VISION = (
    Vision(
        "Qwen2_5_VL",
        QWEN_TOKENS
        | {
            "text_config": qwen_text(),
            "vision_config": QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]},
        },
        patches,
        core=True,
    ),
    Vision(
        "Llava",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": TOWER | {"model_type": "clip_vision_model", "patch_size": 8},
            "image_token_index": MEDIUM,
        },
        square,
        core=True,
    ),
    Vision(
        "Gemma3",
        {
            "text_config": TEXT | {"head_dim": 16, "sliding_window": 8},
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": MEDIUM,
        },
        square,
        groups=GEMMA2,
    ),
    Vision(
        "Qwen2VL",
        QWEN_TOKENS | {"text_config": qwen_text(), "vision_config": QWEN_TOWER | {"embed_dim": 96, "hidden_size": 64}},
        patches,
    ),
    Vision(
        "Qwen3VL",
        QWEN_TOKENS
        | {
            "text_config": qwen_text(mrope_interleaved=True),
            "vision_config": QWEN_TOWER | {"deepstack_visual_indexes": [0, 2], "num_position_embeddings": 16},
        },
        patches,
    ),
    Vision(
        "Mistral3",
        {
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 16},
            "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 24},
            "image_token_index": MEDIUM,
            "spatial_merge_size": 2,
        },
        sized,
    ),
    Vision(
        "Idefics3",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": TOWER,
            "image_token_id": MEDIUM,
            "scale_factor": 2,
            "pad_token_id": 0,
        },
        lambda: {"pixel_values": torch.randn(1, 1, 3, 16, 16)},
        "model.text_model.layers",
    ),
    Vision(
        "InternVL",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": TOWER | {"image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": MEDIUM,
        },
        square,
    ),
    Vision(
        "Mllama",
        {
            "text_config": TEXT
            | {
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": TOWER
            | {
                "attention_heads": 4,
                "patch_size": 8,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 192,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": MEDIUM,
        },
        tiled,
        tokens=0,
        unread=(1,),
    ),
    Vision(
        "Qwen2Audio",
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "audio_config": {
                "d_model": 96,
                "encoder_layers": 4,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 384,
                "num_mel_bins": 16,
                "max_source_positions": 8,
            },
            "audio_token_index": MEDIUM,
        },
        sound,
    ),
)


def tiny_vision(vision: Vision) -> Any:
    """A random model that sees: no part of it is the 0 or 1 that it starts as, and every weight matters."""
    model_class = vision.model_class()
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**vision.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 or "norm" in name or not parameter.any():
                parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
            else:
                parameter.mul_(4)
    return model
