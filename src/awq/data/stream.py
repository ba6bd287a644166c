"""`TokenStream`: documents in a seeded order as one stream of tokens, cut into blocks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

from awq.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document: TypeAlias = str | Sequence[int]

# Long texts are cut into pieces of this size before the shuffle, so that a few blocks still see all of a long text.
_PIECE_CHARACTERS = 4096


class TokenStream:
    """The documents of one source. Text is tokenized once, when it is first reached, without special tokens.

    Texts are joined by a blank line, not by the end-of-sequence token: in a chat model that one ends a turn, and the
    extreme activations of special tokens would weigh on every Gram matrix. Token lists are joined as they are.
    """

    def __init__(
        self, name: str, documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, seed: int
    ) -> None:
        self.name = name
        self._pieces = [piece for document in documents for piece in _pieces(document) if len(piece)]
        self._tokens: dict[int, Sequence[int]] = {}
        self._tokenizer = tokenizer
        self._seed = seed

    def blocks(self, count: int, seq_len: int, readings: int = 1) -> list[list[int]]:
        """The first `count` blocks of `seq_len` tokens, or as many as `readings` readings of the text give.

        Each reading has its own order. CalibrationError where one reading gives no block at all.
        """
        stream = self._stream(readings)
        blocks: list[list[int]] = []
        while len(blocks) < count and len(block := list(islice(stream, seq_len))) == seq_len:
            blocks.append(block)
        if self._is_read and (size := self._size) < seq_len:
            raise CalibrationError(
                f"{self.name} is too short to calibrate on: it gives {size} tokens, and one block needs {seq_len}; "
                "give more text or a smaller seq_len."
            )
        return blocks

    def readings(self, tokens: int) -> int:
        """How many times the text was read to give `tokens` tokens."""
        return -(-tokens // self._size) if self._is_read else 1

    @property
    def _is_read(self) -> bool:
        return len(self._tokens) == len(self._pieces)

    @property
    def _size(self) -> int:
        return sum(map(len, self._tokens.values()))

    def _stream(self, readings: int) -> Iterator[int]:
        shuffle = random.Random(f"{self._seed} {self.name}").shuffle
        order = list(range(len(self._pieces)))
        for _ in range(readings):
            shuffle(order)
            for index in order:
                if index not in self._tokens:
                    self._tokens[index] = self._encode(self._pieces[index])
                yield from self._tokens[index]

    def _encode(self, piece: Document) -> Sequence[int]:
        if not isinstance(piece, str):
            return piece
        if self._tokenizer is None:
            raise CalibrationError(f"{self.name} is text, and there is no tokenizer to read it: give token lists.")
        ids: list[int] = self._tokenizer.encode(piece + "\n\n", add_special_tokens=False, verbose=False)
        return ids


def _pieces(document: Document) -> Iterator[Document]:
    """A text in pieces of at most `_PIECE_CHARACTERS`, cut at the end of a line or a word where there is one."""
    if not isinstance(document, str):
        yield document
        return
    start = 0
    while start < len(document):
        end = start + _PIECE_CHARACTERS
        if end < len(document):
            cut = max(document.rfind(mark, start + _PIECE_CHARACTERS // 2, end) for mark in ("\n", " "))
            end = cut + 1 if cut > 0 else end
        if piece := document[start:end].strip("\n"):
            yield piece
        start = end
