"""`awq chat`: a conversation with a quantized checkpoint, whose cache is kept from turn to turn."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.generation import checkpoint_loader
from awq.cli.output import say

if TYPE_CHECKING:
    from awq.bench.generation import Streamer

_HELP = "An empty line or Ctrl-D ends, /reset starts anew, Ctrl-C stops an answer."


def chat(
    checkpoint: options.Checkpoint,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: options.MaxNewTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    head: options.Head = None,
    version: options.Version = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Talk to a quantized model; every line is a turn."""
    settings = options.sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    options.check_text("--system", system or "")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 do not end a conversation
    target = options.torch_device(device)
    import torch
    from transformers import TextStreamer

    from awq.bench.generation import Clock

    load = checkpoint_loader(checkpoint, target, head, revision, trust_remote_code)
    tokenizer = options.load_tokenizer(checkpoint, revision, trust_remote_code)
    model = load(version=version)
    talk = Conversation(model, tokenizer, system, settings | {"max_new_tokens": max_new_tokens})
    torch.manual_seed(seed)
    say(f"{model.engine}. {_HELP}")
    while line := _read():
        if line == "/reset":
            talk.reset()
            continue
        clock = Clock(TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        try:
            talk.ask(line, clock)
        except KeyboardInterrupt:
            talk.forget()
            say(" (stopped)")
        if clock.tokens_per_second:
            say(f"[{clock.tokens_per_second:.1f} tokens/s, the first after {1e3 * clock.first:.0f} ms]")


def _read() -> str:
    """The next line of the user's; nothing at the end of the input."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


class Conversation:
    """Turns of a user and a model. What both have said stays in the cache, as far as the template repeats it."""

    def __init__(self, model: Any, tokenizer: Any, system: str | None, settings: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self._start = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Start anew, after the same words to the model."""
        self.messages = list(self._start)
        self.forget()

    def forget(self) -> None:
        """Drop the cache, not the conversation: it is read again with the next turn."""
        self._cache: Any = None
        self._held: list[int] = []  # the tokens whose keys and values the cache has

    def ask(self, text: str, streamer: Streamer | None = None) -> str:
        """The answer to `text`, after all that was said before; without one, `text` counts as not said."""
        self.messages.append({"role": "user", "content": text})
        try:
            tokens, given = self._generate(streamer)
        except BaseException:  # Ctrl-C too: a template may want a question answered before the next
            self.messages.pop()
            raise
        sequence = given.sequences[0].tolist()
        self._cache, self._held = given.past_key_values, sequence[:-1]
        answer = str(self.tokenizer.decode(sequence[len(tokens) :], skip_special_tokens=True))
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _generate(self, streamer: Streamer | None) -> tuple[list[int], Any]:
        """The tokens of all that was said, and what the model makes of them."""
        import torch

        tokens = self._tokens()
        self._keep(tokens)
        prompt = torch.tensor([tokens], device=self.model.device)
        given = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self._cache,
            streamer=streamer,
            return_dict_in_generate=True,
            **self.settings,
        )
        return tokens, given

    def _tokens(self) -> list[int]:
        """All that was said, through the template; without one, line by line."""
        from awq.pretrained.bounds import bounded
        from awq.pretrained.unreadable import one_sentence

        if not self.tokenizer.chat_template:
            return list(self.tokenizer("\n".join(message["content"] for message in self.messages) + "\n")["input_ids"])
        with one_sentence(self.tokenizer.name_or_path, "chat template"), bounded():
            encoded = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def _keep(self, tokens: list[int]) -> None:
        """Crop the cache to what it has in common with `tokens`, but for the last of them, which is to be read."""
        from awq.engine import KVCache

        same = 0
        for held, wanted in zip(self._held, tokens[:-1], strict=False):
            if held != wanted:
                break
            same += 1
        if same and isinstance(self._cache, KVCache):
            self._cache.crop(same - len(self._held))
        else:
            self.forget()
