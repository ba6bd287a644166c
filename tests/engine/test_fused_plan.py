"""The structure of decoders: found in every tiny model of the common kind, run by torch as the model runs itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from awq.engine.cache import KVCache, windows_of
from awq.engine.fused.discover import discover
from awq.engine.fused.norms import as_rms_norm
from awq.engine.fused.plan import Plan, Rope
from awq.engine.fused.reference import ReferenceStep
from tests.architectures.families import COMMON, FAMILIES, Family, tiny

CPU = torch.device("cpu")
# What is of the common kind among the families, and a word of why the others are not.
ACCEPTED = {"Llama", "Llama-biases", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "Granite", "SmolLM3", "Ernie4_5"}
REFUSED = {
    "Gemma2": "softcap",
    "Gemma3": "stream behind attention",
    "Phi": "norm with one weight",
    "GPT2": "other linears",
    "GPTJ": "transformers' interface",
    "Olmo2": "norm with one weight",
    "Cohere": "no RMSNorm",
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
        "original_max_position_embeddings": 24,
        "factor": 4.0,
    },
}


def family(name: str) -> Family:
    found = next(each for each in FAMILIES if str(each) == name)
    if found.model_class() is None:
        pytest.skip(f"this transformers has no {found.name}ForCausalLM")
    return found


def plan_of(model: Any) -> Plan:
    plan = discover(model)
    assert isinstance(plan, Plan), plan
    return plan


def decoded(model: Any, tokens: Tensor, padding: int = 0) -> Tensor:
    """Logits [tokens, batch, vocabulary] of the plan, a token at a time from an empty cache."""
    windows = windows_of(model.config)
    assert isinstance(windows, list)
    batch, length = tokens.shape
    cache = KVCache(windows, batch, 256, CPU)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = torch.zeros(batch, config.num_key_value_heads, 0, size)
    for layer in cache.parts:
        layer.lazy_initialization(empty, empty)
    step, logits = ReferenceStep(plan_of(model)), []
    for slot in range(length):
        cache.first[0] = padding if slot >= padding else 0
        cache.slot.fill_(slot)
        positions = (slot - cache.first).clamp(min=0).unsqueeze(1)
        logits.append(step.decode(tokens[:, slot : slot + 1], positions, cache))
    return torch.stack(logits)


def own(model: Any, tokens: Tensor) -> Tensor:
    """The same by the model, token by token with its own cache."""
    logits, cache = [], None
    with torch.no_grad():
        for slot in range(tokens.shape[1]):
            output = model(input_ids=tokens[:, slot : slot + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
    return torch.stack(logits).float()


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 90, (batch, length), generator=torch.Generator().manual_seed(3))


def distance(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_the_plan_gives_the_logits_of_the_model(name: str) -> None:
    model = tiny(family(name))
    tokens = random_tokens(2, 20)
    assert distance(decoded(model, tokens), own(model, tokens)) < 1e-4


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_decoders_are_refused_with_a_reason(name: str) -> None:
    reason = discover(tiny(family(name)))
    assert isinstance(reason, str) and REFUSED[name] in reason


@pytest.mark.slow
@pytest.mark.parametrize("each", FAMILIES, ids=str)
def test_every_family_has_a_plan_or_a_reason(each: Family) -> None:
    found = discover(tiny(family(str(each))))
    assert isinstance(found, Plan) == (str(each) in ACCEPTED), found


def model_of(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.4 - 0.2) if parameter.ndim == 1 else parameter.mul_(4)
    return model


@pytest.mark.parametrize("rope", ROPES)
def test_every_kind_of_rope(rope: str) -> None:
    """Beyond the positions at which dynamic and long ones change."""
    model = model_of("llama", max_position_embeddings=24, rope_parameters=ROPES[rope] | {"rope_theta": 10000.0})
    tokens = random_tokens(1, 36)
    assert distance(decoded(model, tokens), own(model, tokens)) < 1e-4


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2": (
        "llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 48, "tie_word_embeddings": True},
    ),
    "Llama-2": ("llama", {"num_key_value_heads": 4}),
    "Llama-3": ("llama", {"rope_parameters": ROPES["llama3"] | {"rope_theta": 500000.0}}),
    "Qwen2.5": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Mistral without a window": ("mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_common_models_have_a_plan(shape: str) -> None:
    kind, settings = SHAPES[shape]
    model = model_of(kind, **settings)
    plan = plan_of(model)
    assert len(plan.layers) == 2
    heads = plan.layers[0].attention
    assert (heads.heads, heads.key_heads) == (model.config.num_attention_heads, model.config.num_key_value_heads)
    assert heads.rope is not None and (heads.query_norm is not None) == (kind == "qwen3")
    tokens = random_tokens(1, 14)
    assert distance(decoded(model, tokens), own(model, tokens)) < 1e-4


def test_padding_before_a_prompt_is_not_seen() -> None:
    model = model_of("llama")
    tokens = random_tokens(2, 18)
    padded = decoded(model, tokens, padding=5)
    assert distance(padded[5:, 0], own(model, tokens[:1, 5:])[:, 0]) < 1e-4
    assert distance(padded[:, 1], own(model, tokens[1:])[:, 0]) < 1e-4


def test_in_half_precision_too() -> None:
    for kind in ("llama", "qwen3"):
        for dtype in (torch.float16, torch.bfloat16):
            assert isinstance(discover(model_of(kind).to(dtype)), Plan)


def test_a_changed_layer_is_noticed() -> None:
    model = model_of("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    assert "act(gate)" in str(discover(model))
    model = model_of("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (output[0] * 1.5, *output[1:]))
    plan = plan_of(model)  # a factor of the result is part of a plan
    assert plan.layers[1].output_factor == pytest.approx(1.5, rel=1e-3) and plan.layers[0].output_factor == 1
    model.model.layers[0].self_attn.register_forward_hook(lambda module, args, output: (output[0].abs(), *output[1:]))
    assert "behind attention" in str(discover(model))


def test_the_model_is_as_it_was() -> None:
    model = model_of("mistral", sliding_window=8)
    before, name = own(model, random_tokens(1, 9)), model.config._attn_implementation
    discover(model)
    assert model.config._attn_implementation == name
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(own(model, random_tokens(1, 9)), before)


def test_norms_are_told_by_their_numbers() -> None:
    plain, layer = torch.nn.RMSNorm(8, eps=3e-5), torch.nn.LayerNorm(8, bias=False)
    torch.nn.init.uniform_(plain.weight, -1, 1)
    found = as_rms_norm(plain, 8, CPU)
    assert found is not None and found.epsilon == pytest.approx(3e-5, rel=1e-3)
    assert torch.allclose(found.weight, plain.weight, atol=1e-6)
    assert as_rms_norm(layer, 8, CPU) is None


def test_a_table_of_rope_is_that_of_single_positions() -> None:
    plan = plan_of(
        model_of("llama", max_position_embeddings=16, rope_parameters=ROPES["dynamic"] | {"rope_theta": 1e4})
    )
    rope = plan.layers[0].attention.rope
    assert isinstance(rope, Rope)
    table = rope.table(40)
    assert table.shape == (40, 8, 2) and torch.equal(table[:16], rope.table(16))
    assert torch.equal(table[:30], rope.table(30))  # although all 40 at once would scale by the last
