"""Options that several commands share, and what they all do before they load a model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.errors import ConfigError

if TYPE_CHECKING:
    import torch

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, all else on stderr.")]
Device = Annotated[str, typer.Option(help="auto (the first CUDA GPU, else the CPU), cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that a model brings along.")]
TextColumn = Annotated[str, typer.Option(help="Key or column of the text in jsonl, parquet and hub rows.")]
Version = Annotated[str | None, typer.Option(help="Pin the kernel version, GEMM or GEMV; else chosen per call.")]
Checkpoint = Annotated[str, typer.Argument(metavar="DIR", help="A quantized checkpoint: a folder or a hub id.")]
Reference = Annotated[str | None, typer.Option(help="The float model: a folder, a .gguf file or a hub id.")]
Head = Annotated[
    str | None, typer.Option(help="int8 rounds the float output head; what that does to perplexity is printed.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from so many likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this share.")]
MinP = Annotated[float, typer.Option(min=0, max=1, help="Sample from tokens this likely next to the likeliest.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes tokens that were said less likely.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop after this text; repeatable.")]
Plot = Annotated[Path | None, typer.Option(help="Also draw the result into this file: .png, .svg or .pdf.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository on the hub private.")]


def quiet_libraries() -> None:
    """No progress bars and notices of other libraries beside ours; to be called before they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def sampling(
    temperature: float, top_k: int | None, top_p: float, min_p: float, repetition_penalty: float
) -> dict[str, Any]:
    """The arguments of `generate` for these options; ConfigError for one out of range."""
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is out of range: use more than 0 and at most 1.")
    if not 0 < repetition_penalty < math.inf:
        raise ConfigError(f"repetition_penalty={repetition_penalty} is out of range: use more than 0, and 1 for none.")
    if not math.isfinite(temperature):
        raise ConfigError(f"temperature={temperature} is out of range: use 0 for the likeliest token, or about 1.")
    found: dict[str, Any] = {"do_sample": temperature > 0}
    if repetition_penalty != 1:
        found["repetition_penalty"] = repetition_penalty
    if temperature:
        found |= {"temperature": temperature, "top_p": top_p}
        found |= {"top_k": top_k} if top_k is not None else {}
        found |= {"min_p": min_p} if min_p else {}
    return found


def check_text(option: str, text: str) -> None:
    """ConfigError for bytes that are no UTF-8: Python holds each as half a surrogate pair, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{option} is no UTF-8 from character {error.start} on: give text in that encoding."
        ) from None


def torch_device(word: str) -> torch.device:
    """The device that a word means; ConfigError for an unknown or absent one."""
    quiet_libraries()
    from awq.pretrained.source import pick_device

    return pick_device(word)


def load_tokenizer(folder: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local folder or hub snapshot; CheckpointError where it has none."""
    from transformers import AutoTokenizer

    from awq.checkpoint.read import read_config
    from awq.errors import CheckpointError
    from awq.pretrained.limits import check_folder, check_tokenizer
    from awq.pretrained.source import find_folder
    from awq.pretrained.unreadable import one_sentence

    path = find_folder(folder, revision=revision)
    read_config(path)  # of a folder of something else, what it lacks is not the tokenizer
    check_folder(path, trust_remote_code)
    check_tokenizer(path)
    try:
        with one_sentence(folder, "tokenizer"):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        if any(path.glob("tokenizer*")):
            raise
        raise CheckpointError(f"{folder} has no readable tokenizer: copy the tokenizer files into it.") from error
