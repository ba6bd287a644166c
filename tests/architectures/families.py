"""Tiny random models of transformers' own classes, and the scale groups that must be found in each of their blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 96
SPECIAL = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
# Four query heads over two key heads; what a class does not know, its configuration keeps unread.
COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    **SPECIAL,
}
OLD: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, **SPECIAL}

# Why a linear is behind no producer that its scale could be folded into.
GELU = "its input comes out of a GELU, through which no scale passes"
RESIDUAL = "it reads the residual stream itself: the norm comes behind it"
NORM_IS_RESIDUAL = "the norm that it reads is the residual stream too"

NORM_QKV = "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
V_O = "self_attn.v_proj -> self_attn.o_proj"
GATE_UP = "mlp.gate_proj, mlp.up_proj"
UP_DOWN = "mlp.up_proj -> mlp.down_proj"
LLAMA = (NORM_QKV, V_O, f"post_attention_layernorm -> {GATE_UP}", UP_DOWN)
GEMMA2 = (NORM_QKV, V_O, f"pre_feedforward_layernorm -> {GATE_UP}", UP_DOWN)
PARALLEL = (f"{NORM_QKV}, {GATE_UP}", V_O, UP_DOWN)
POST_NORM = (V_O, UP_DOWN)
POST_NORM_UNSCALED = dict.fromkeys(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), RESIDUAL
)
FUSED_MLP = ("post_attention_layernorm -> mlp.gate_up_proj", "mlp.gate_up_proj -> mlp.down_proj")
PHI = (
    "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.fc1",
    "self_attn.v_proj -> self_attn.dense",
)
NEOX = (
    "input_layernorm -> attention.query_key_value",
    "attention.query_key_value -> attention.dense",
    "post_attention_layernorm -> mlp.dense_h_to_4h",
)
FALCON = (
    "input_layernorm -> self_attention.query_key_value, mlp.dense_h_to_4h",
    "self_attention.query_key_value -> self_attention.dense",
)
BLOOM = (
    "input_layernorm -> self_attention.query_key_value",
    "self_attention.query_key_value -> self_attention.dense",
    "post_attention_layernorm -> mlp.dense_h_to_4h",
)
FALCON_BLOOM_UNSCALED = {"mlp.dense_4h_to_h": GELU}


@dataclass(frozen=True)
class Family:
    """A class of transformers, tiny: its configuration, and per block what is scaled ("producer -> consumers")."""

    name: str
    groups: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=lambda: COMMON)
    unscaled: dict[str, str] = field(default_factory=dict)
    variant: str = ""
    core: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    def model_class(self) -> Any:
        names = (f"{self.name}ForCausalLM", f"{self.name}LMHeadModel")
        return next((found for name in names if (found := getattr(transformers, name, None))), None)


FAMILIES = (
    Family("Llama", LLAMA, core=True),
    Family("Llama", LLAMA, COMMON | {"attention_bias": True, "mlp_bias": True, "head_dim": 8}, variant="biases"),
    Family("Mistral", LLAMA, COMMON | {"sliding_window": 8}),
    Family("Qwen2", LLAMA, core=True),
    Family("Qwen3", LLAMA, COMMON | {"head_dim": 32}, core=True),
    Family("Gemma", LLAMA, COMMON | {"head_dim": 16, "num_key_value_heads": 1}),
    Family("Gemma2", GEMMA2, COMMON | {"head_dim": 16, "sliding_window": 8}),
    Family("Gemma3", GEMMA2, COMMON | {"head_dim": 16, "sliding_window": 8}, core=True),
    Family(
        "Phi3",
        ("input_layernorm -> self_attn.qkv_proj", "self_attn.qkv_proj -> self_attn.o_proj", *FUSED_MLP),
        core=True,
    ),
    Family("Phi", PHI, unscaled={"mlp.fc2": GELU}),
    Family("Phi", PHI, COMMON | {"qk_layernorm": True}, {"mlp.fc2": GELU}, "qk-norm"),
    Family(
        "OPT",
        (
            "self_attn_layer_norm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
            "self_attn.v_proj -> self_attn.out_proj",
            "final_layer_norm -> fc1",
            "fc1 -> fc2",
        ),
        COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    Family(
        "OPT",
        ("self_attn.v_proj -> self_attn.out_proj", "fc1 -> fc2"),
        COMMON | {"ffn_dim": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), RESIDUAL)
        | {"fc1": NORM_IS_RESIDUAL},
        "post-norm",
    ),
    Family(
        "GPT2",
        ("ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"),
        OLD | {"n_embd": 64, "n_positions": 128},
        {"mlp.c_proj": GELU},
        core=True,
    ),
    Family("GPTNeoX", NEOX, unscaled={"mlp.dense_4h_to_h": GELU}, core=True),
    Family(
        "GPTNeoX",
        (*NEOX, "mlp.dense_h_to_4h -> mlp.dense_4h_to_h"),
        COMMON | {"use_parallel_residual": False, "hidden_act": "relu"},
        variant="sequential-relu",
    ),
    Family(
        "GPTJ",
        ("ln_1 -> attn.q_proj, attn.k_proj, attn.v_proj, mlp.fc_in", "attn.v_proj -> attn.out_proj"),
        OLD | {"n_embd": 64, "n_positions": 128, "rotary_dim": 8},
        {"mlp.fc_out": GELU},
    ),
    Family("Bloom", BLOOM, OLD | {"hidden_size": 64}, FALCON_BLOOM_UNSCALED, core=True),
    Family(
        "Falcon",
        (
            "ln_attn -> self_attention.query_key_value",
            "self_attention.query_key_value -> self_attention.dense",
            "ln_mlp -> mlp.dense_h_to_4h",
        ),
        COMMON | {"num_kv_heads": 2, "new_decoder_architecture": True},
        FALCON_BLOOM_UNSCALED,
    ),
    Family("Falcon", FALCON, COMMON | {"multi_query": True}, FALCON_BLOOM_UNSCALED, "multi-query"),
    Family(
        "Falcon",
        BLOOM,
        COMMON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        FALCON_BLOOM_UNSCALED,
        "alibi",
    ),
    Family(
        "Mpt",
        ("norm_1 -> attn.Wqkv", "attn.Wqkv -> attn.out_proj", "norm_2 -> ffn.up_proj"),
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "vocab_size": VOCABULARY, **SPECIAL},
        {"ffn.down_proj": GELU},
    ),
    Family(
        "OpenAIGPT",
        ("attn.c_attn -> attn.c_proj",),
        OLD | {"n_embd": 64, "n_positions": 128},
        {"attn.c_attn": RESIDUAL, "mlp.c_fc": NORM_IS_RESIDUAL, "mlp.c_proj": GELU},
    ),
    Family("StableLm", LLAMA),
    Family(
        "StableLm",
        PARALLEL,
        COMMON | {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
        variant="parallel",
    ),
    Family(
        "Starcoder2",
        (NORM_QKV, V_O, "post_attention_layernorm -> mlp.c_fc"),
        unscaled={"mlp.c_proj": GELU},
    ),
    Family("Cohere", PARALLEL, COMMON | {"use_qk_norm": True}),
    Family("Cohere2", PARALLEL, COMMON | {"sliding_window": 8}),
    Family("Olmo2", POST_NORM, unscaled=POST_NORM_UNSCALED, core=True),
    Family("Granite", LLAMA, COMMON | {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    Family("Glm4", (NORM_QKV, V_O, *FUSED_MLP), COMMON | {"head_dim": 16, "attention_bias": True}),
    Family("SmolLM3", LLAMA),
    Family(
        "Exaone4",
        POST_NORM,
        COMMON | {"sliding_window": 8, "sliding_window_pattern": 2},
        POST_NORM_UNSCALED,
    ),
    Family("Ernie4_5", LLAMA, COMMON | {"head_dim": 16}),
    Family(
        "XLMRoberta",  # its tied lm_head comes before the embedding that it is tied to
        ("attention.self.value -> attention.output.dense",),
        COMMON | {"is_decoder": True},
        dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), RESIDUAL)
        | {"intermediate.dense": NORM_IS_RESIDUAL, "output.dense": GELU},
    ),
)


def tiny(family: Family) -> Any:
    """A random model whose norms and biases are not the 1 and 0 that they start as, and whose weights matter."""
    model_class = family.model_class()
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**family.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "norm" in name:
                parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2)
            else:
                parameter.mul_(4)
    return model
