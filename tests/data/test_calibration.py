from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq.data.calibration import DEFAULT_SOURCES, builtin_text, evaluation_text, load_calibration
from awq.errors import CalibrationError
from tests.tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()


def decode(tokens: torch.Tensor) -> str:
    return str(TOKENIZER.decode(tokens.flatten().tolist()))


def test_the_default_mixes_prose_and_code_evenly() -> None:
    found = load_calibration(TOKENIZER, samples=10, seq_len=256)
    assert found.tokens.shape == (10, 256)
    assert found.tokens.dtype == torch.int64
    assert DEFAULT_SOURCES == ("prose", "code")
    assert found.description[0] == "5 blocks of 256 tokens from built-in prose"
    assert found.description[1].startswith(
        "5 blocks of 256 tokens from built-in code (the standard library of Python 3."
    )
    assert len(found.description) == 2


def test_the_same_seed_gives_the_same_blocks() -> None:
    one, same, other = (load_calibration(TOKENIZER, samples=8, seq_len=64, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_pileval_is_replaced_and_said() -> None:
    found = load_calibration(TOKENIZER, "pileval", samples=4, seq_len=64)
    assert torch.equal(found.tokens, load_calibration(TOKENIZER, samples=4, seq_len=64).tokens)
    assert found.description[-1] == "the built-in text stands for pileval, AutoAWQ's default"


def test_an_empty_list_means_the_built_in_text_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="empty list: the built-in text is used") as caught:
        found = load_calibration(TOKENIZER, [], samples=4, seq_len=64)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert torch.equal(found.tokens, load_calibration(TOKENIZER, samples=4, seq_len=64).tokens)


@pytest.mark.parametrize("given", ["code", ["code"], ("code",)])
def test_a_reserved_word_names_a_source(given: Any) -> None:
    found = load_calibration(TOKENIZER, given, samples=2, seq_len=64)
    assert torch.equal(found.tokens, load_calibration(TOKENIZER, sources=["code"], samples=2, seq_len=64).tokens)
    assert decode(found.tokens[0]) in "\n\n".join(builtin_text("code"))


def test_a_file_of_a_reserved_name_needs_its_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "prose").write_text("x" * 100)
    monkeypatch.chdir(tmp_path)
    assert decode(load_calibration(TOKENIZER, "./prose", samples=1, seq_len=64).tokens) == "x" * 64
    assert "xxxx" not in decode(load_calibration(TOKENIZER, "prose", samples=1, seq_len=64).tokens)


def test_texts_are_packed_with_a_blank_line_and_no_special_token() -> None:
    texts = ["alpha", "beta", "gamma"]
    found = load_calibration(TOKENIZER, texts, samples=1, seq_len=15)
    assert 0 not in found.tokens
    orders = ["".join(f"{text}\n\n" for text in order) for order in permutations(texts)]
    assert any(order.startswith(decode(found.tokens)) for order in orders)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=8), seq_len=st.integers(2, 50))
def test_no_token_is_dropped_but_the_tail(lengths: list[int], seq_len: int) -> None:
    """Token lists of any length are cut and packed: every token is used once, in its order, but the last few."""
    lists, start = [], 0
    for length in lengths:
        lists.append(list(range(start, start + length)))
        start += length
    if start < seq_len:
        with pytest.raises(CalibrationError, match=f"gives {start} tokens, and one block needs {seq_len}"):
            load_calibration(None, lists, samples=2000, seq_len=seq_len)
        return
    blocks = load_calibration(None, lists, samples=2000, seq_len=seq_len).tokens
    used = blocks.flatten().tolist()
    assert len(blocks) == start // seq_len
    assert max(Counter(used).values()) == 1
    breaks = sum(b != a + 1 for a, b in pairwise(used))
    assert breaks < len(lists)


def test_token_lists_of_one_block_stay_as_they_are() -> None:
    lists = torch.randint(0, 300, (6, 32)).tolist()
    found = load_calibration(None, lists, samples=6, seq_len=32)
    assert sorted(found.tokens.tolist()) == sorted(lists)
    assert found.description == ("6 blocks of 32 tokens from the calibration data",)


def test_a_long_text_is_cut_and_seen_in_many_places() -> None:
    text = "\n".join(f"line {number:06d} of a long text" for number in range(4000))
    found = load_calibration(TOKENIZER, [text], samples=40, seq_len=512)
    lines = [int(word) for word in decode(found.tokens).split() if len(word) == 6 and word.isdigit()]
    assert len(found.tokens) == 40
    assert len(lines) == len(set(lines))
    assert max(lines) > 3000 > 1000 > min(lines)


def test_a_long_text_without_any_space() -> None:
    found = load_calibration(TOKENIZER, ["漢" * 20_000], samples=3, seq_len=64)
    assert found.tokens.shape == (3, 64)


def test_less_text_gives_fewer_blocks_and_says_so() -> None:
    found = load_calibration(TOKENIZER, ["word " * 50], samples=128, seq_len=64)
    assert len(found.tokens) == (250 + 2) // 64
    assert found.description[-1] == "3 blocks instead of the 128 asked for: there is no more text"


@pytest.mark.parametrize("order", [("large", "small"), ("small", "large")])
def test_sources_are_drawn_evenly_and_interleaved(tmp_path: Path, order: tuple[str, str]) -> None:
    (tmp_path / "large.txt").write_text("L" * 50_000)
    (tmp_path / "small.txt").write_text("s" * 1000)
    sources = [tmp_path / f"{name}.txt" for name in order]
    found = load_calibration(TOKENIZER, sources=sources, samples=20, seq_len=100)
    first = [chr(ord(decode(block)[50])) for block in found.tokens]
    assert first == [order[0][0].replace("l", "L"), order[1][0].replace("l", "L")] * 10
    assert len(found.description) == 2


def test_a_short_source_is_read_again_but_not_for_ever(tmp_path: Path) -> None:
    """It keeps its weight beside a long one, up to four readings."""
    (tmp_path / "large.txt").write_text("L" * 50_000)
    (tmp_path / "small.txt").write_text("s" * 350)
    sources = [tmp_path / "large.txt", tmp_path / "small.txt"]
    found = load_calibration(TOKENIZER, sources=sources, samples=20, seq_len=100)
    assert found.description[0].startswith("10 blocks")
    assert found.description[1] == f"10 blocks of 100 tokens from {sources[1]}, read 3 times"
    found = load_calibration(TOKENIZER, sources=sources, samples=80, seq_len=100)
    counts = Counter(decode(block).strip()[20] for block in found.tokens)
    assert counts == {"L": 40, "s": 14}
    assert found.description[-1].startswith("54 blocks instead of the 80")


def test_one_source_alone_is_never_repeated() -> None:
    lists = [list(range(i * 100, i * 100 + 100)) for i in range(3)]
    assert len(load_calibration(None, lists, samples=64, seq_len=100).tokens) == 3


def test_each_text_is_tokenized_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer, seen = byte_tokenizer(), []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: seen.append(text) or encode(text, **options))
    (tmp_path / "small.jsonl").write_text("\n".join(f'{{"text": "sample {i}"}}' for i in range(20)))
    load_calibration(tokenizer, sources=[tmp_path / "small.jsonl", "code"], samples=16, seq_len=64)
    assert len(seen) == len(set(seen))
    assert len(seen) < 60


def test_own_samples() -> None:
    model = tiny_llama()
    found = load_calibration(TOKENIZER, "self", samples=3, seq_len=16, model=model)
    assert found.tokens.shape == (3, 16)
    assert found.description == ("3 blocks of 16 tokens from the model's own samples",)
    mixed = load_calibration(TOKENIZER, sources=["self", "code"], samples=5, seq_len=16, model=model)
    assert [line.split()[0] for line in mixed.description] == ["3", "2"]
    with pytest.raises(CalibrationError, match="needs the float model"):
        load_calibration(TOKENIZER, "self", samples=3, seq_len=16)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([""], "gives 0 tokens"),
        (["", "  \n"], "tokens, and one block needs 64"),
        ([[]], "gives 0 tokens"),
        ([[1, 2, 3]], "gives 3 tokens, and one block needs 64; give more text or a smaller seq_len"),
        (["text", [1, 2]], "all lists of token ids: it holds list, str"),
        ([[1, 2], "text"], "it holds list, str"),
        ([{"text": "x"}], "it holds dict"),
        ([[1.5, 2.5]], "integers from 0"),
        ([[1, -100]], "integers from 0"),
        ("no/such/file.txt", "does not exist"),
        ({"a": 1}, "or a source: it is dict"),
        (5, "it is int"),
        (torch.ones(2, 64), "it is Tensor"),
        (b"text", "it holds int"),
    ],
)
def test_bad_data_gets_a_sentence(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(TOKENIZER, data, samples=4, seq_len=64)


def test_an_empty_file_is_an_error_and_no_fallback(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(CalibrationError, match=r"empty\.txt holds no text"):
        load_calibration(TOKENIZER, tmp_path / "empty.txt")


def test_a_too_small_source_is_named_beside_a_large_one(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("tiny")
    with pytest.raises(CalibrationError, match=r"tiny\.txt is too short .* gives 6 tokens"):
        load_calibration(TOKENIZER, sources=["code", tmp_path / "tiny.txt"], samples=4, seq_len=64)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(CalibrationError, match="both as data and as sources"):
        load_calibration(TOKENIZER, "prose", sources=["code"])
    with pytest.raises(CalibrationError, match="no tokenizer"):
        load_calibration(None, "prose")
    for samples, seq_len in [("5", 64), (2.5, 64), (4, None)]:
        with pytest.raises(CalibrationError, match="give two whole numbers"):
            load_calibration(TOKENIZER, samples=samples, seq_len=seq_len)  # type: ignore[arg-type]
    for samples, seq_len in [(0, 64), (4, 1)]:
        with pytest.raises(CalibrationError, match="too few"):
            load_calibration(TOKENIZER, samples=samples, seq_len=seq_len)


def test_evaluation_text_shares_no_block_with_the_default() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks = load_calibration(TOKENIZER, "prose", samples=10_000, seq_len=128).tokens
    assert not any(decode(block)[20:100] in evaluation_text() for block in blocks)
