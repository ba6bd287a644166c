"""`awq generate`: answer one prompt with a quantized checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.generation import checkpoint_loader
from awq.cli.output import print_json, say
from awq.errors import ConfigError

if TYPE_CHECKING:
    from awq.bench.generation import Clock


def generate(
    checkpoint: options.Checkpoint,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to answer or to continue.")],
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, without the chat template.")] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    head: options.Head = None,
    version: options.Version = None,
    kernel: Annotated[str | None, typer.Option(help="One backend by name, for bug reports.")] = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt with a quantized model."""
    sampling = options.sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    options.check_text("--prompt", prompt)
    for text in stop or ():
        options.check_text("--stop", text)
        if not text:
            raise ConfigError("--stop is empty: give the text to stop after.")
    target = options.torch_device(device)
    import torch
    from transformers import TextStreamer

    from awq.bench.generation import Clock

    load = checkpoint_loader(checkpoint, target, head, revision, trust_remote_code)
    tokenizer = options.load_tokenizer(checkpoint, revision, trust_remote_code)
    model = load(version=version, kernel=kernel)
    inputs = encode(tokenizer, prompt, raw).to(model.device)
    torch.manual_seed(seed)
    if stop:
        sampling |= {"stop_strings": stop, "tokenizer": tokenizer}
    clock = Clock(None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=clock, **sampling)
    prompt_tokens = inputs["input_ids"].shape[1]
    figures = _figures(clock, prompt_tokens, output.shape[1] - prompt_tokens)
    if as_json:
        text = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
        how = {"kernels": kernels_in_use(model), "engine": str(model.engine)}
        print_json({"prompt": prompt, "text": text, **figures, **how})
    else:
        say(_line(figures))


def encode(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """The prompt as a batch of one: through the chat template where there is one and not `raw`."""
    from awq.pretrained.bounds import bounded
    from awq.pretrained.unreadable import one_sentence

    if raw or not tokenizer.chat_template:
        with one_sentence(tokenizer.name_or_path, "tokenizer"):
            encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    else:
        messages = [{"role": "user", "content": prompt}]
        with one_sentence(tokenizer.name_or_path, "chat template"), bounded():
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
    if encoded["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt holds no token: give some text to continue.")
    return encoded


def kernels_in_use(model: Any) -> dict[str, int]:
    """How many linears run on each kernel."""
    from awq.linear import QuantLinear

    choices = (module.choice for module in model.modules() if isinstance(module, QuantLinear))
    return dict(Counter(choice.kernel.name for choice in choices))


def _figures(clock: Clock, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_ms": 1e3 * clock.first,
        "tokens_per_second": clock.tokens_per_second,
    }


def _line(figures: dict[str, Any]) -> str:
    speed = figures["tokens_per_second"]
    rate = f", then {speed:.1f} tokens/s" if speed else ""
    plural = "" if figures["new_tokens"] == 1 else "s"
    return f"{figures['new_tokens']} token{plural}, the first after {figures['ttft_ms']:.0f} ms{rate}."
