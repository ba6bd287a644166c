"""`awq bench model`: how fast a checkpoint, or a known shape with random weights, generates here."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.output import format_bytes, print_json, print_table, say
from awq.config import KERNEL_VERSIONS
from awq.errors import AwqError, ConfigError, KernelNotSupportedError

if TYPE_CHECKING:
    import torch

    from awq.bench.generation import Latency

AUTO = "auto"
_GPU_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
Model = Annotated[
    str, typer.Argument(metavar="DIR|SHAPE", help="A quantized checkpoint, or a shape: llama-2-7b, llama-3-8b, ...")
]


def bench_model(
    checkpoint: Model,
    reference: options.Reference = None,
    version: Annotated[
        list[str] | None, typer.Option(help="auto, GEMV or GEMM; repeatable.", show_default="all three")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Queries at once; repeatable.", show_default="1; 1 to 128 on a GPU")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Queries a version and batch.")] = 3,
    tier: Annotated[int | None, typer.Option(min=0, max=2, help="Use no faster way to generate than this one.")] = None,
    outlier_ratio: Annotated[float, typer.Option(help="Of a shape with random weights: channels kept in fp16.")] = 0.0,
    head: options.Head = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this CSV file, or a folder's own.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure latency and throughput of a model for each kernel version and batch."""
    target = options.torch_device(device)
    from awq.bench.report import generation_file, machine_facts, write_generation
    from awq.kernels import pinned_version
    from awq.pretrained.source import find_source

    source = find_source(reference, trust_remote_code=trust_remote_code) if reference else None
    file = generation_file(csv, target) if csv else None
    versions = [pinned_version(word, notice=True) or AUTO for word in version or (AUTO, *KERNEL_VERSIONS)]
    load = _loader(checkpoint, target, outlier_ratio, head, revision, trust_remote_code)
    settings: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    settings |= {"repeats": repeats, "seed": seed, "ceiling_gbs": _ceiling(target)}
    batches = batch or (_GPU_BATCHES if target.type == "cuda" else (1,))
    rows, refused = bench_versions(load, versions, batches=batches, tier=tier, **settings)
    if source:
        rows += [bench_float(source.load, target, batch=each, **settings) for each in batches]
    machine = machine_facts(target)
    if file:
        variant = (f"{100 * outlier_ratio:g} % outliers" if outlier_ratio else "", f"{head} head" if head else "")
        write_generation(file, " ".join(filter(None, (checkpoint, *variant))), rows, machine)
    if as_json:
        print_json({"machine": machine, "model": checkpoint, "rows": rows, "refused": refused})
        return
    for label, reason in refused.items():
        say(f"{label}: {reason}")
    for line in dict.fromkeys(f"{row.label}: {row.engine}" for row in rows):
        say(line)
    title = f"{prompt_tokens} + {new_tokens} tokens on {machine['device']}, torch {machine['torch']}"
    print_table(title, latency_columns(rows), map(latency_cells, rows))


def _loader(
    checkpoint: str, target: torch.device, outlier_ratio: float, head: str | None, revision: str | None, trust: bool
) -> Callable[..., Any]:
    """What makes the model of a version: random weights for the name of a shape that is no folder, else the folder."""
    from awq.bench.models import MODELS, config_of, random_model

    if not Path(checkpoint).exists() and "/" not in checkpoint:
        if checkpoint.lower() not in MODELS:
            raise ConfigError(f"{checkpoint} does not exist, and is no known shape ({', '.join(MODELS)}).")
        config = config_of(checkpoint.lower())
        return partial(random_model, config, target, outlier_ratio=outlier_ratio, head=head)
    if outlier_ratio:
        raise ConfigError(f"--outlier-ratio is for shapes with random weights, and {checkpoint} is a checkpoint.")
    return checkpoint_loader(checkpoint, target, head, revision, trust)


def checkpoint_loader(
    checkpoint: str, target: torch.device, head: str | None, revision: str | None, trust: bool
) -> Callable[..., Any]:
    """What loads the checkpoint, given `version` and `kernel`; what a rounded head costs is said first."""
    from awq.storage.load import load_quantized

    if head:
        say(head_effect(checkpoint, head, target, revision, trust))
    return partial(load_quantized, checkpoint, device=target, head=head, revision=revision, trust_remote_code=trust)


def head_effect(checkpoint: str, head: str, target: torch.device, revision: str | None, trust: bool) -> str:
    """A sentence with the perplexity of the built-in text before and after the head is replaced."""
    from awq.engine.head import use_head
    from awq.evaluate import evaluation_tokens, perplexity
    from awq.storage.load import load_quantized

    tokenizer = options.load_tokenizer(checkpoint, revision, trust)
    model = load_quantized(checkpoint, device=target, revision=revision, trust_remote_code=trust)
    ids = evaluation_tokens(tokenizer, None)
    before = perplexity(model, ids, 512, 4).value
    use_head(model, head)
    after = perplexity(model, ids, 512, 4).value
    return (
        f"head={head}: perplexity {before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.2f} %) on 4 x 512 tokens."
    )


def _ceiling(device: torch.device) -> float | None:
    """The read ceiling of a GPU that its kernel is made for."""
    if device.type != "cuda":
        return None
    from awq.bench.kernels.ceiling import read_ceiling

    try:
        return read_ceiling(device)
    except AwqError as error:
        say(f"no read ceiling: {error}")
        return None


def latency_columns(rows: Sequence[Latency]) -> tuple[str, ...]:
    peak = f"peak memory: {rows[0].peak_of}" if rows else "peak memory"
    times = ("TTFT [ms]", "ms/token p50", "p90", "p99", "tokens/s", "of read floor")
    return ("version", "tier", "batch", *times, "weights", peak)


def latency_cells(row: Latency) -> tuple[object, ...]:
    times = (row.ttft_ms, row.token_ms_p50, row.token_ms_p90, row.token_ms_p99, row.tokens_per_second)
    memory = (format_bytes(row.weight_bytes), format_bytes(row.peak_bytes))
    return row.label, row.tier, row.batch, *times, row.read_floor_fraction, *memory


def bench_versions(
    load: Callable[..., Any],
    versions: Sequence[str],
    *,
    batches: Sequence[int] = (1,),
    tier: int | None = None,
    **settings: Any,
) -> tuple[list[Latency], dict[str, str]]:
    """A row for each version that runs here and batch, and why others do not; `load(version=...)` gives the model."""
    rows: list[Latency] = []
    refused: dict[str, str] = {}
    for version in versions:
        try:
            model = load(version=version)
        except KernelNotSupportedError as error:
            refused[version] = str(error)
            continue
        if tier is not None:
            model.engine.limit(tier)
        rows += _batches(model, version, batches, refused, settings)
        del model
        gc.collect()
    return rows, refused


def _batches(
    model: Any, version: str, batches: Sequence[int], refused: dict[str, str], settings: dict[str, Any]
) -> Iterator[Latency]:
    """A row a batch, until memory runs out."""
    from awq.bench.generation import measure_generation
    from awq.errors import OutOfMemoryError

    for batch in batches:
        try:
            yield measure_generation(model, version, batch=batch, **settings)
        except OutOfMemoryError as error:
            refused[f"{version}, batch {batch}"] = str(error)
            return


def bench_float(load: Callable[[torch.dtype], Any], device: torch.device, **settings: Any) -> Latency:
    """The row of the float model that `load` returns, in the half precision that is fast on the device."""
    import torch

    from awq.bench.generation import measure_generation

    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    label = f"float ({str(dtype).removeprefix('torch.')})"
    return measure_generation(load(dtype).to(device), label, **settings)
