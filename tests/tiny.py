"""Tiny random models and a tiny tokenizer, so that a test takes milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 300


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two blocks of width 64, four query heads over two key heads, weights large enough to matter."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.mul_(4)
        model.model.embed_tokens.weight[:, :3] *= 20  # salient channels
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and <eos> as token 0: no merges, no download."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def save_tiny(folder: Path, model: LlamaForCausalLM | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """A tiny model folder with its tokenizer, as a user would have it."""
    (model or tiny_llama()).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def user_script(model: str) -> str:
    """The script that every AutoAWQ user has, as given but for its model and the folder it writes, `model`-awq."""
    return f"""
import torch
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer

model_path = "{model}"
tokenizer = AutoTokenizer.from_pretrained(model_path)
model = AutoAWQForCausalLM.from_pretrained(model_path, torch_dtype=torch.float16, device_map="auto")
quant_config = {{"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}}
calibration_data = [
    # Code samples for code models, prose for language models
]
model.quantize(tokenizer, calib_dataset=calibration_data)
model.save_quantized("{model}-awq")
model = AutoAWQForCausalLM.from_quantized("{model}-awq", version="GEMV")
"""


def save_tiny_gguf(path: Path) -> Path:
    """The tiny model as one GGUF file, in float16."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    from gguf import GGUFWriter  # a machine that only runs tests/gpu need not have it

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    letters = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    unused = [f"<{i}>" for i in range(len(letters) + 2, VOCABULARY)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, "ab", "cd", *unused])
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    parts |= {f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"}
    parts |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    names |= {f"model.layers.{i}.{part}": f"blk.{i}.{name}" for i in range(2) for part, name in parts.items()}
    for name, tensor in model.named_parameters():
        kind = torch.float32 if tensor.ndim == 1 else torch.float16
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", tensor.detach().to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
