import csv
from pathlib import Path

import pytest
import torch

from awq.bench.generation import measure_generation, step_bytes, weight_bytes
from awq.bench.kernels.shapes import MODELS as SHAPES
from awq.bench.models import MODELS, config_of, random_model
from awq.bench.report import GENERATION_COLUMNS, generation_file, write_generation
from awq.errors import ConfigError
from awq.linear import QuantLinear
from tests.tiny import random_tokens, tiny_llama

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_kernels(name: str) -> None:
    """The rows of q, k and v, of o, of gate and up, and of down, as `bench kernels` knows them."""
    config = config_of(name)
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    qkv = width + 2 * head * config.num_key_value_heads
    inner = config.intermediate_size
    assert SHAPES[name] == ((qkv, width), (width, width), (2 * inner, width), (width, inner))


@pytest.mark.parametrize("outlier_ratio", [0.0, 0.02])
def test_a_random_model_generates(outlier_ratio: float) -> None:
    config = tiny_llama(attention_bias=True).config
    model = random_model(config, CPU, dtype=torch.bfloat16, outlier_ratio=outlier_ratio)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14
    assert {bool(linear.spec.outliers) for linear in linears} == {bool(outlier_ratio)}
    with torch.no_grad():
        logits = model(random_tokens(2, 9)).logits.float()
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    assert model.generate(random_tokens(1, 5), max_new_tokens=4, min_new_tokens=4, pad_token_id=0).shape == (1, 9)
    assert model.engine.tier == 2


def test_what_a_step_reads() -> None:
    config = tiny_llama().config
    model = random_model(config, CPU, dtype=torch.bfloat16)
    embedding = model.get_input_embeddings().weight.nbytes
    cached = 2 * 2 * 2 * 16 * 2  # layers, keys and values, heads, width, bytes
    assert step_bytes(model, 3, 10) == weight_bytes(model) - embedding + 30 * cached
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    assert step_bytes(model, 1, 0) == weight_bytes(model)


def test_rows_of_generation(tmp_path: Path) -> None:
    model = random_model(tiny_llama().config, CPU, dtype=torch.bfloat16)
    rows = [
        measure_generation(model, "auto", batch=batch, prompt_tokens=4, new_tokens=3, repeats=1, ceiling_gbs=100.0)
        for batch in (1, 2)
    ]
    assert [row.tier for row in rows] == [2, 2]
    assert rows[0].read_floor_fraction == pytest.approx(rows[0].read_bytes / 1e8 / rows[0].token_ms_p50)
    machine = {"device": "a CPU", "driver": None, "torch": "2", "commit": None, "device_type": "cpu"}
    file = generation_file(tmp_path, CPU)
    assert file.name.startswith("generation-")
    for _ in range(2):
        write_generation(file, "tiny", rows, machine)
    with file.open(newline="") as text:
        found = list(csv.DictReader(text))
    assert tuple(found[0]) == GENERATION_COLUMNS
    assert [row["batch"] for row in found] == ["1", "2", "1", "2"]
    assert found[0]["model"] == "tiny"
    with pytest.raises(ConfigError, match=r"the folder .* does not exist"):
        generation_file(tmp_path / "absent" / "rows.csv", CPU)


def test_a_tier_can_be_capped() -> None:
    model = random_model(tiny_llama().config, CPU, dtype=torch.bfloat16)
    model.engine.limit(0)
    assert measure_generation(model, "auto", prompt_tokens=4, new_tokens=3, repeats=1).tier == 0
    assert str(model.engine) == "tier 0: transformers' own loop, as asked"
