"""Evaluation text to tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awq.data import evaluation_text
from awq.data.files import read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path | None = None,
    split: str = "test",
    text_column: str = "text",
) -> Tensor:
    """Tokens int64 [n], without special tokens, of the built-in evaluation prose (None), a file, folder or data set.

    Several documents are joined by a blank line. Errors as `awq.data.files.read_texts` raises them.
    """
    text = evaluation_text() if source is None else "\n\n".join(read_texts(source, split, text_column))
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=torch.int64)
