import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import awq.storage.load
from tests.cli.run import refused, run, run_json

TEMPLATE = "{% for message in messages %}<{{ message.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.fixture
def chatty(quantized: Path, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(quantized, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_as_json(quantized: Path) -> None:
    answer = run_json("generate", quantized, "-p", "hello", "--max-new-tokens", 6, "--device", "cpu")
    assert answer["prompt"] == "hello"
    assert answer["prompt_tokens"] == 5
    assert 1 <= answer["new_tokens"] <= 6
    assert answer["ttft_ms"] > 0
    assert sum(answer["kernels"].values()) == 14


def test_text_on_stdout_and_speed_on_stderr(quantized: Path) -> None:
    flags = ("--max-new-tokens", 6, "--device", "cpu")
    shown, answer = (
        run("generate", quantized, "-p", "hello", *flags),
        run_json("generate", quantized, "-p", "hello", *flags),
    )
    assert shown.exit_code == 0
    assert shown.stdout.strip() == answer["text"].strip()
    assert "tokens/s." in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


def test_chat_template_is_used_unless_raw(chatty: Path) -> None:
    flags = ("--max-new-tokens", 2, "--device", "cpu")
    assert run_json("generate", chatty, "-p", "hello", *flags)["prompt_tokens"] == len("<hello>:")
    assert run_json("generate", chatty, "-p", "hello", "--raw", *flags)["prompt_tokens"] == len("hello")


def test_sampling_repeats_with_its_seed(quantized: Path) -> None:
    def answer(seed: int) -> str:
        sampling = ("--temperature", 2.0, "--top-p", 0.95, "--seed", seed)
        return str(
            run_json("generate", quantized, "-p", "a", "--max-new-tokens", 12, "--device", "cpu", *sampling)["text"]
        )

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_revision_and_trust_arrive(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    load = awq.storage.load.load_quantized

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return load(*arguments, **options)

    monkeypatch.setattr(awq.storage.load, "load_quantized", spy)
    flags = ("--max-new-tokens", 2, "--device", "cpu", "--revision", "v1", "--trust-remote-code")
    run_json("generate", quantized, "-p", "a", *flags)
    (options,) = seen
    assert options["revision"] == "v1"
    assert options["trust_remote_code"]


@pytest.mark.parametrize("flags", [("--version", "gemv"), ("--version", "GEMM"), ("--kernel", "reference")])
def test_kernel_by_name(quantized: Path, flags: tuple[str, str]) -> None:
    answer = run_json("generate", quantized, "-p", "a", "--max-new-tokens", 2, "--device", "cpu", *flags)
    if flags[0] == "--kernel":
        assert answer["kernels"] == {"reference": 14}


def test_stop_strings_and_what_changes_a_sample(quantized: Path) -> None:
    flags = ("-p", "a", "--max-new-tokens", 40, "--device", "cpu")
    free = str(run_json("generate", quantized, *flags)["text"])
    letter = next(letter for letter in free[3:] if letter.isascii() and letter.isprintable())
    stopped = run_json("generate", quantized, *flags, "--stop", letter)
    assert stopped["text"] == free[: free.index(letter) + 1]
    assert stopped["engine"].startswith("tier 2")
    sampled = ("--temperature", 1.5, "--top-k", 5, "--min-p", 0.1, "--repetition-penalty", 1.2)
    assert run_json("generate", quantized, *flags, *sampled)["text"] != free
    assert "0 and 1" not in refused("generate", quantized, *flags, "--repetition-penalty", 0)
