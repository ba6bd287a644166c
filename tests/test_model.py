"""The drop-in face: AutoAWQ's scripts run as they stand."""

import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from awq import AutoAWQForCausalLM
from awq.checkpoint.read import open_checkpoint
from awq.errors import AwqError, CheckpointError, ConfigError, KernelNotSupportedError
from awq.linear import QuantLinear
from awq.model import AwqModel
from tests.tiny import byte_tokenizer, random_tokens, save_tiny, user_script

pytestmark = pytest.mark.filterwarnings("ignore:.*vLLM")

QUANT_CONFIG = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 8] * 6


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "float")


@pytest.fixture(scope="module")
def quantized_folder(float_folder: Path) -> Path:
    model = AutoAWQForCausalLM.from_pretrained(float_folder)
    model.quantize(byte_tokenizer(), QUANT_CONFIG, calib_data=TEXTS, max_calib_samples=8, max_calib_seq_len=64)
    model.save_quantized(float_folder.parent / "awq")
    return float_folder.parent / "awq"


@pytest.mark.filterwarnings("default")
def test_the_users_script_as_it_stands(
    float_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "float-model").symlink_to(float_folder)
    (tmp_path / "script.py").write_text(user_script("float-model"))
    monkeypatch.chdir(tmp_path)
    model = runpy.run_path("script.py")["model"]
    assert {m.choice.version for m in model.modules() if isinstance(m, QuantLinear)} == {"GEMV"}
    said = [str(warning.message) for warning in recwarn]
    assert sum("empty" in text for text in said) == 1
    assert sum(text.startswith("Group size 64: 128 does not divide") for text in said) == 1
    assert all("vLLM" in text for text in said[2:])


def test_signatures_take_what_autoawq_took() -> None:
    old = {
        AutoAWQForCausalLM.from_pretrained: "model_path torch_dtype trust_remote_code safetensors device_map "
        "download_kwargs low_cpu_mem_usage use_cache",
        AutoAWQForCausalLM.from_quantized: "quant_path quant_filename max_seq_len trust_remote_code fuse_layers "
        "use_exllama use_exllama_v2 use_ipex batch_size safetensors device_map max_memory offload_folder "
        "download_kwargs",
        AwqModel.save_quantized: "self save_dir safetensors shard_size",
    }
    for function, names in old.items():
        assert list(inspect.signature(function).parameters)[: len(names.split())] == names.split()


def test_save_load_generate(quantized_folder: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(quantized_folder, fuse_layers=True, max_seq_len=2048)
    assert model.is_quantized
    assert model.model_type == "llama"
    tokens = model.generate(random_tokens(1, 8), max_new_tokens=4, do_sample=False)
    assert 9 <= tokens.shape[1] <= 12
    assert model(input_ids=tokens).logits.shape[:2] == tokens.shape
    assert model.to("cpu") is model


def test_quantized_in_memory_it_generates_at_once(float_folder: Path) -> None:
    model = AutoAWQForCausalLM.from_pretrained(float_folder, dtype=torch.float32)
    assert not model.is_quantized
    model.quantize(byte_tokenizer(), {"w_bit": 4, "q_group_size": 32}, calib_data=TEXTS, max_calib_seq_len=64)
    assert model.is_quantized
    assert model.quant_config.group_size == 32
    assert model.generate(random_tokens(1, 8), max_new_tokens=2).shape[1] >= 9
    model.pack()


def test_every_old_keyword_is_accepted_and_idle_ones_are_named_once(float_folder: Path, quantized_folder: Path) -> None:
    with pytest.warns(UserWarning, match="from_quantized: batch_size, use_exllama_v2 have no effect"):
        AutoAWQForCausalLM.from_quantized(quantized_folder, max_seq_len=512, batch_size=4, use_exllama_v2=True)
    with pytest.warns(UserWarning, match="from_pretrained: use_cache has no effect"):
        model = AutoAWQForCausalLM.from_pretrained(float_folder, use_cache=True)
    with pytest.warns(UserWarning, match="quantize: duo_scaling, n_parallel_calib_samples have no effect"):
        model.quantize(
            byte_tokenizer(), QUANT_CONFIG, TEXTS, duo_scaling=False, n_parallel_calib_samples=2, max_calib_seq_len=64
        )


def test_saving_what_was_loaded_copies_it(quantized_folder: Path, tmp_path: Path) -> None:
    AutoAWQForCausalLM.from_quantized(quantized_folder).save_quantized(tmp_path / "copy")
    first, second = open_checkpoint(quantized_folder), open_checkpoint(tmp_path / "copy")
    assert first.linears == second.linears
    for name in first.linears:
        assert torch.equal(first.packed(name).qweight, second.packed(name).qweight)


def test_the_copy_has_shards_of_the_size_asked_for(quantized_folder: Path, tmp_path: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(quantized_folder)
    with pytest.raises(ConfigError, match="'nonsense' is no size"):
        model.save_quantized(tmp_path / "copy", shard_size="nonsense")
    model.save_quantized(tmp_path / "copy", shard_size="20KB")
    assert len([*(tmp_path / "copy").glob("model-*.safetensors")]) > 1
    assert open_checkpoint(tmp_path / "copy").linears == open_checkpoint(quantized_folder).linears


@pytest.mark.parametrize("device_map", ["auto", "balanced", "cpu", {"": "cpu"}, None])
def test_device_maps_of_one_device(quantized_folder: Path, device_map: Any) -> None:
    assert AutoAWQForCausalLM.from_quantized(quantized_folder, device_map=device_map).device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    "placing",
    [
        {"device_map": "auto", "max_memory": {"cpu": 60_000}},
        {"device_map": "sequential", "max_memory": {"cpu": 100_000}},
        {"device_map": {"": "cpu", "model.layers.1": "disk"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("folder", [True, False])
def test_parts_in_memory_and_on_disk(quantized_folder: Path, tmp_path: Path, placing: Any, folder: bool) -> None:
    """Nothing but where the weights lie: the same tokens."""
    whole = AutoAWQForCausalLM.from_quantized(quantized_folder, device_map="cpu")
    spread = AutoAWQForCausalLM.from_quantized(
        quantized_folder, offload_folder=str(tmp_path / "offload") if folder else None, **placing
    )
    assert "disk" in spread.model.hf_device_map.values()
    assert any(parameter.is_meta for parameter in spread.model.parameters())
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = random_tokens(2, 8)
    assert torch.equal(spread.generate(prompt, **settings), whole.generate(prompt, **settings))
    assert spread.engine.tier == 1
    assert "no CUDA graph (the model is spread over " in str(spread.engine)
    assert folder == (tmp_path / "offload").exists()


def test_a_cap_and_another_head(quantized_folder: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(quantized_folder, max_seq_len=16, head="int8")
    assert model.generate(random_tokens(1, 8), max_new_tokens=8, do_sample=False).shape[1] <= 16
    with pytest.raises(ConfigError, match="exceed max_seq_len=16"):
        model.generate(random_tokens(1, 8), max_new_tokens=9)
    assert type(model.model.get_output_embeddings()).__name__ == "Int8Head"


def test_a_seed_of_its_own(quantized_folder: Path) -> None:
    model = AutoAWQForCausalLM.from_quantized(quantized_folder)
    settings = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, "pad_token_id": 0, "eos_token_id": None}
    state = torch.get_rng_state()
    first, again, other = (model.generate(random_tokens(1, 8), seed=seed, **settings) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_calls_are_one_sentence(
    float_folder: Path, quantized_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="from_pretrained or"):
        AutoAWQForCausalLM()
    with pytest.raises(CheckpointError, match="already quantized"):
        AutoAWQForCausalLM.from_pretrained(quantized_folder)
    with pytest.raises(ConfigError, match="device_map names '9', which is not there"):
        AutoAWQForCausalLM.from_quantized(quantized_folder, device_map={"a": 9, "b": "cpu"})
    with pytest.raises(ConfigError, match=r"device_map has no place for model\.layers\.0\.self_attn\.q_proj"):
        AutoAWQForCausalLM.from_quantized(quantized_folder, device_map={"model.norm": "disk", "lm_head": "cpu"})
    for length in (-5, 0, "5", 2.5):
        with pytest.raises(ConfigError, match="is no number of tokens"):
            AutoAWQForCausalLM.from_quantized(quantized_folder, max_seq_len=length)
    with pytest.raises(ConfigError, match="None names no model"):
        AutoAWQForCausalLM.from_pretrained(None)  # type: ignore[arg-type]
    for device_map in ({"": "tpu"}, {"model": "cpu", "lm_head": "tpu"}):
        with pytest.raises(ConfigError, match="device 'tpu' is unknown"):
            AutoAWQForCausalLM.from_pretrained(float_folder, device_map=device_map)
    model = AutoAWQForCausalLM.from_pretrained(float_folder)
    with pytest.raises(AwqError, match=r"call quantize\(\) before"):
        model.save_quantized("out")
    with pytest.raises(ConfigError, match="needs the model's tokenizer"):
        model.quantize(calib_data=TEXTS)
    with pytest.raises(ConfigError, match="unknown setting 'gropu'"):
        model.quantize(byte_tokenizer(), {"gropu": 1})
    with pytest.raises(AwqError, match="already quantized"):
        AutoAWQForCausalLM.from_quantized(quantized_folder).quantize(byte_tokenizer())


def test_a_version_that_the_hardware_cannot_run(quantized_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.kernels.refusal", lambda _device: "a test GPU has compute capability 5.2")
    with pytest.raises(RuntimeError, match=r"^Kernel version not supported on this hardware") as caught:
        AutoAWQForCausalLM.from_quantized(quantized_folder, version="GEMV")
    assert isinstance(caught.value, KernelNotSupportedError)
