"""Text to token blocks: what the quantizer looks at, drawn evenly from its sources, the same for the same seed."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from awq.data import builtin_text, evaluation_text
from awq.data.files import read_texts
from awq.data.samples import sample_tokens
from awq.data.stream import Document, TokenStream
from awq.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_SOURCES",
    "RESERVED_SOURCES",
    "CalibrationSet",
    "builtin_text",
    "evaluation_text",
    "load_calibration",
]

DEFAULT_SOURCES = ("prose", "code")
RESERVED_SOURCES = ("prose", "code", "self")
# A source shorter than the others is read again, in another order, rather than drowned: this many times in all.
_MAX_READINGS = 4

Source: TypeAlias = str | Path | Sequence[Document]


@dataclass(frozen=True)
class CalibrationSet:
    """Token blocks, int64 [n, seq_len], and the lines that say where they come from."""

    tokens: Tensor
    description: tuple[str, ...]


def load_calibration(
    tokenizer: PreTrainedTokenizerBase | None,
    data: Source | None = None,
    *,
    sources: Sequence[str | Path] | None = None,
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    split: str = "train",
    text_column: str = "text",
    model: nn.Module | None = None,
) -> CalibrationSet:
    """At most `samples` blocks of `seq_len` tokens, from `data` or drawn evenly from several `sources`.

    data:      texts, token lists (used as they are), or one source; None, [] and "pileval" mean the built-in mix
    sources:   each "prose", "code", "self" (what `model` writes), or what `awq.data.files.read_texts` reads with
               `split` and `text_column`; a local file of a reserved name is ./prose
    tokenizer: may be None where all data are token lists

    Long texts are cut and short ones packed, so nothing is dropped for its length. Less text than asked gives fewer
    blocks, said in the description; a source with less than one block is a CalibrationError.
    """
    counts: tuple[Any, ...] = (samples, seq_len)
    if not all(isinstance(count, Integral) for count in counts):
        raise CalibrationError(f"{samples!r} samples of {seq_len!r} tokens cannot be drawn: give two whole numbers.")
    if samples < 1 or seq_len < 2:
        raise CalibrationError(f"{samples} samples of {seq_len} tokens are too few: ask for at least 1 of 2 tokens.")
    chosen, notes = _choose(data, sources)
    shares = [len(range(first, samples, len(chosen))) for first in range(len(chosen))]
    streams = []
    for source, share in zip(chosen, shares, strict=True):
        written = _own_samples(model, share, seq_len, seed) if source == "self" else None
        documents = written or _documents(source, split, text_column)
        streams.append(TokenStream(_label(source), documents, tokenizer, seed))
    drawn = _draw_evenly(streams, shares, seq_len)
    # Interleaved, so that any leading part of the set is as mixed as the whole.
    blocks = [block for block in chain.from_iterable(zip_longest(*drawn)) if block is not None]
    lines = [_describe(stream, part, seq_len) for stream, part in zip(streams, drawn, strict=True)]
    if len(blocks) < samples:
        notes.append(f"{len(blocks)} blocks instead of the {samples} asked for: there is no more text")
    return CalibrationSet(torch.tensor(blocks, dtype=torch.int64), (*lines, *notes))


def _choose(data: Any, sources: Sequence[str | Path] | None) -> tuple[list[Source], list[str]]:
    """What is meant by the arguments, and notes for the description."""
    if sources and data is not None:
        raise CalibrationError("calibration is given both as data and as sources: give one of them.")
    if isinstance(data, str | Path):
        sources = [data]
    elif data is not None and not isinstance(data, Sequence):
        kind = type(data).__name__
        raise CalibrationError(
            f"calibration data must be a list of texts or of token lists, or a source: it is {kind}."
        )
    elif data and all(isinstance(item, str) and item in RESERVED_SOURCES for item in data):
        sources = [str(item) for item in data]
    elif data:
        return [_checked(data)], []
    elif data is not None:
        warnings.warn("the calibration data is an empty list: the built-in text is used.", stacklevel=3)
    chosen: list[Source] = list(sources or DEFAULT_SOURCES)
    if "pileval" not in chosen:
        return chosen, []
    at = chosen.index("pileval")
    chosen[at : at + 1] = DEFAULT_SOURCES
    return chosen, ["the built-in text stands for pileval, AutoAWQ's default"]


def _checked(data: Sequence[Document]) -> Sequence[Document]:
    """`data` where it holds texts alone or token lists alone."""
    if all(isinstance(item, str) for item in data):
        return data
    if not all(isinstance(item, list | tuple) for item in data):
        kinds = ", ".join(sorted({type(item).__name__ for item in data}))
        raise CalibrationError(f"calibration data must be all strings or all lists of token ids: it holds {kinds}.")
    if any(not isinstance(token, int) or token < 0 for item in data for token in item):
        raise CalibrationError("calibration data as token lists must hold the tokenizer's ids: integers from 0.")
    return data


def _documents(source: Source, split: str, text_column: str) -> Sequence[Document]:
    if not isinstance(source, str | Path):
        return source
    return builtin_text(source) if source in ("prose", "code") else read_texts(source, split, text_column)


def _own_samples(model: nn.Module | None, count: int, seq_len: int, seed: int) -> Sequence[Document]:
    if model is None:
        raise CalibrationError("'self' calibrates on what the model writes: it needs the float model in memory.")
    return sample_tokens(model, count, seq_len, seed)


def _label(source: Source) -> str:
    if not isinstance(source, str | Path):
        return "the calibration data"
    code = f"built-in code (the standard library of Python {platform.python_version()})"
    return {"prose": "built-in prose", "code": code, "self": "the model's own samples"}.get(str(source), str(source))


def _draw_evenly(streams: Sequence[TokenStream], shares: Sequence[int], seq_len: int) -> list[list[list[int]]]:
    """The share of each stream in blocks; a stream too short for it is read again, up to what the longest gave."""
    drawn = [stream.blocks(share, seq_len) for stream, share in zip(streams, shares, strict=True)]
    longest = max(map(len, drawn))
    for index, (stream, share) in enumerate(zip(streams, shares, strict=True)):
        if len(drawn[index]) < min(share, longest):
            drawn[index] = stream.blocks(min(share, longest), seq_len, _MAX_READINGS)
    return drawn


def _describe(stream: TokenStream, blocks: Sequence[Sequence[int]], seq_len: int) -> str:
    readings = stream.readings(len(blocks) * seq_len)
    again = f", read {readings} times" if readings > 1 else ""
    return f"{len(blocks)} blocks of {seq_len} tokens from {stream.name}{again}"
