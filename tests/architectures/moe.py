"""Mixtures of experts: tiny models, the groups of each kind of block, and the names under which experts are stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.architectures.families import COMMON, LLAMA, NORM_QKV, UP_DOWN, V_O, Family

SMALL = COMMON | {
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "decoder_sparse_step": 1,
}
SHARED = SMALL | {"shared_expert_intermediate_size": 64}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

CLAMPED = "its input is (up + 1) times a clamped gate, through which no scale passes"

# "*" stands for every expert; the routers are float, and compensated.
EXPERTS = "mlp.experts.*.gate_proj, mlp.experts.*.up_proj"
EXPERT_UP_DOWN = "mlp.experts.*.up_proj -> mlp.experts.*.down_proj"
PLAIN = (NORM_QKV, V_O, f"post_attention_layernorm -> mlp.gate, {EXPERTS}", EXPERT_UP_DOWN)
SHARED_EXPERT = "mlp.shared_expert.gate_proj, mlp.shared_expert.up_proj"
GATED_SHARED = (
    f"post_attention_layernorm -> mlp.gate, {EXPERTS}, {SHARED_EXPERT}, mlp.shared_expert_gate",
    EXPERT_UP_DOWN,
    "mlp.shared_expert.up_proj -> mlp.shared_expert.down_proj",
)
MLA = (
    "input_layernorm -> self_attn.q_a_proj, self_attn.kv_a_proj_with_mqa",
    "self_attn.q_a_layernorm -> self_attn.q_b_proj",
    "self_attn.kv_a_layernorm -> self_attn.kv_b_proj",
    "self_attn.kv_b_proj -> self_attn.o_proj",
)
DEEPSEEK = (
    (*MLA, "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj", UP_DOWN),
    (
        *MLA,
        f"post_attention_layernorm -> mlp.gate, {EXPERTS}, mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj",
        EXPERT_UP_DOWN,
        "mlp.shared_experts.up_proj -> mlp.shared_experts.down_proj",
    ),
)
LLAMA4_DENSE = tuple(group.replace("mlp.", "feed_forward.") for group in LLAMA)
LLAMA4 = (
    NORM_QKV,
    V_O,
    *(
        group.replace("mlp.gate,", "mlp.router,")
        .replace(", mlp.shared_expert_gate", "")
        .replace("mlp.", "feed_forward.")
        for group in GATED_SHARED
    ),
)
DELTA_NET = (
    "input_layernorm -> linear_attn.in_proj_qkvz, linear_attn.in_proj_ba",
    "linear_attn.norm -> linear_attn.out_proj",  # a norm of each head by itself
)
FUSED_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mixture:
    """A class of transformers with experts, tiny.

    blocks:   the groups of each block
    unscaled: linears that no scale reaches, with the reason
    stored:   what an expert's gate, up and down projection are called in the files
    fused:    whether transformers' own files hold all experts in one tensor
    """

    family: Family
    blocks: tuple[tuple[str, ...], ...]
    unscaled: dict[str, str] = field(default_factory=dict)
    stored: tuple[str, str, str] = FUSED_LINEARS
    fused: bool = False

    def __str__(self) -> str:
        return str(self.family)


def mixture(name: str, config: dict[str, Any], blocks: tuple[tuple[str, ...], ...], **more: Any) -> Mixture:
    variant = more.pop("variant", "")
    core = name in ("Mixtral", "Qwen3Moe") and not variant
    return Mixture(Family(name, (), config, core=core, variant=variant), blocks, **more)


MIXTURES = (
    mixture("Mixtral", SMALL, (PLAIN, PLAIN), stored=("w1", "w3", "w2")),
    mixture("Qwen2Moe", SHARED, ((NORM_QKV, V_O, *GATED_SHARED),) * 2),
    mixture("Qwen3Moe", SMALL | {"head_dim": 32, "norm_topk_prob": True}, (PLAIN, PLAIN)),
    mixture("Qwen3Moe", SMALL | {"mlp_only_layers": [0]}, (LLAMA, PLAIN), variant="dense-first"),
    mixture("Olmoe", SMALL, (PLAIN, PLAIN)),
    mixture("DeepseekV2", LATENT | {"topk_method": "group_limited_greedy"}, DEEPSEEK),
    mixture(
        "DeepseekV2",
        LATENT | {"q_lora_rank": None},
        tuple(("input_layernorm -> self_attn.q_proj, self_attn.kv_a_proj_with_mqa", *block[2:]) for block in DEEPSEEK),
        variant="lite",
    ),
    mixture("DeepseekV3", LATENT, DEEPSEEK),
    mixture(
        "GptOss",
        SMALL | {"head_dim": 16, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ((NORM_QKV, V_O, f"post_attention_layernorm -> mlp.router, {EXPERTS}"),) * 2,
        unscaled={"mlp.experts.*.down_proj": CLAMPED},
        fused=True,
    ),
    mixture(
        "Llama4",
        SMALL | {"intermediate_size": 64, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2, "head_dim": 16},
        (LLAMA4_DENSE, LLAMA4),
        fused=True,
    ),
    mixture(
        "Qwen3Next",
        SHARED
        | {
            "head_dim": 16,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        ((*DELTA_NET, *GATED_SHARED), (NORM_QKV, V_O, *GATED_SHARED)),
    ),
)
