import io
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.testing import CliRunner

from awq.cli import app
from awq.cli.chat import Conversation
from awq.engine import attach
from tests.cli.run import refused
from tests.tiny import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def chat(folder: Path, *lines: str, flags: tuple[Any, ...] = ()) -> Any:
    arguments = ["chat", str(folder), "--device", "cpu", "--max-new-tokens", "6", *map(str, flags)]
    return CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines), catch_exceptions=False)


def test_turns_until_the_input_ends(quantized: Path) -> None:
    result = chat(quantized, "hello", "again", "/reset", "hello")
    assert result.exit_code == 0
    assert result.stderr.startswith("tier 2: fused step of torch operations")
    assert result.stderr.count("tokens/s") == 3
    first, _, third = result.stdout.split("\n")[:3]
    assert first == third


def test_an_empty_line_ends(quantized: Path) -> None:
    assert chat(quantized, "", "hello").stdout == ""


def test_bytes_that_are_no_text_do_not_end_it(quantized: Path) -> None:
    arguments = ["chat", str(quantized), "--device", "cpu", "--max-new-tokens", "2"]
    result = CliRunner().invoke(app, arguments, input=b"hello\ncaf\xff\nagain\n", catch_exceptions=False)
    assert result.exit_code == 0 and result.stderr.count("tokens/s") == 3


def test_wrong_settings(quantized: Path) -> None:
    assert "top_p=0.0" in refused("chat", quantized, "--top-p", 0)
    assert "repetition_penalty=-1.0" in refused("chat", quantized, "--repetition-penalty", -1)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_the_cache_is_kept_and_the_answers_are_the_same(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    plain, model = tiny_llama(), attach(tiny_llama())
    kept = Conversation(model, tokenizer, "be brief", SETTINGS)
    anew = Conversation(plain, tokenizer, "be brief", SETTINGS)
    for turn in ("one", "two and", "three"):
        anew.forget()
        answer = kept.ask(turn)
        assert answer == anew.ask(turn)
        assert kept._cache.get_seq_length() == len(kept._held)
    assert model.engine.last == ""


def test_only_what_differs_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = attach(tiny_llama())
    talk = Conversation(model, tokenizer, None, SETTINGS)
    talk.ask("a question that is not short")
    read: list[int] = []
    forward = type(model).forward

    def spy(self: Any, input_ids: Any = None, **more: Any) -> Any:
        read.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", spy)
    talk.ask("x")
    whole = len(talk._held) + 1 - SETTINGS["max_new_tokens"]
    assert read[0] <= whole - len("<ua question that is not short>")
    talk.reset()
    read.clear()
    talk.ask("x")
    assert read[0] == len("<ux>:")


def test_a_stopped_question_was_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many templates want the roles to alternate: a question without an answer would end the chat."""
    tokenizer = byte_tokenizer()
    alternate = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace("messages %}", "messages %}" + alternate)
    model = attach(tiny_llama())
    talk = Conversation(model, tokenizer, None, SETTINGS)
    first = talk.ask("one")
    generate = model.generate
    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("two")
    assert [message["content"] for message in talk.messages] == ["one", first]
    monkeypatch.setattr(model, "generate", generate)
    talk.forget()
    talk.ask("three")
    assert len(talk.messages) == 4


def interrupted(*_: Any, **__: Any) -> NoReturn:
    raise KeyboardInterrupt


def test_stopping_an_answer(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Conversation, text: str, streamer: Any = None) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "ask", stopped)
    result = chat(quantized, "hello", "more")
    assert result.exit_code == 0
    assert result.stderr.count("(stopped)") == 2


def test_a_terminal_gets_a_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from awq.cli.chat import _read

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal("hi\n"))
    assert _read() == "hi"
    assert capsys.readouterr().err == "> "
