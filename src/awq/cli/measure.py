"""`awq eval` and `awq bench`: how good a checkpoint is, and how fast a model or one linear runs here."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.kernels import bench_kernels
from awq.cli.output import format_bytes, print_facts, print_json, print_table, say
from awq.config import KERNEL_VERSIONS
from awq.errors import KernelNotSupportedError

if TYPE_CHECKING:
    import torch

    from awq.bench.generation import Latency
    from awq.evaluate import Agreement

AUTO = "auto"
BUILT_IN_TEXT = "built-in evaluation prose"
Reference = Annotated[str | None, typer.Option(help="The float model: a folder, a .gguf file or a hub id.")]

bench = typer.Typer(help="Measure latency on this machine: a model, or one linear.", rich_markup_mode=None)


def evaluate(
    checkpoint: options.Checkpoint,
    reference: Reference = None,
    text: Annotated[str | None, typer.Option(help="A text, jsonl or parquet file.", show_default=BUILT_IN_TEXT)] = None,
    text_column: options.TextColumn = "text",
    without_outliers: Annotated[
        bool, typer.Option("--without-outliers", help="The int4 weights alone, as other engines run them.")
    ] = False,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Only the first windows.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval's tasks too: hellaswag,arc_easy,...")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first examples of each task.")] = None,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity, agreement with the float model, and lm-eval's tasks."""
    target = options.torch_device(device)
    from awq.evaluate import check_tasks, compare, evaluate_tasks, evaluation_tokens, perplexity
    from awq.load import load_dequantized
    from awq.source import find_source

    asked = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    if asked:
        check_tasks(asked)
    source = find_source(reference, trust_remote_code=trust_remote_code) if reference else None
    tokenizer = options.load_tokenizer(checkpoint, revision, trust_remote_code)
    ids = evaluation_tokens(tokenizer, text, text_column=text_column)
    model = load_dequantized(
        checkpoint, outliers=not without_outliers, revision=revision, trust_remote_code=trust_remote_code
    ).to(target)
    result: dict[str, Any] = {"model": checkpoint, "outliers": not without_outliers, "text": text or BUILT_IN_TEXT}
    models: dict[str, Any] = {"tasks": model}
    if source is None:
        measured = perplexity(model, ids, window, max_windows)
        result |= {"perplexity": measured.value, "tokens": measured.tokens, "windows": len(measured.nll)}
    else:
        models["reference_tasks"] = source.load(dtype=model.dtype).to(target)
        found = compare(model, models["reference_tasks"], ids, window, max_windows)
        result |= _agreement(found, source.name)
    if asked:
        scores = {name: evaluate_tasks(one, tokenizer, asked, limit) for name, one in models.items()}
        result |= scores if as_json else _flat(scores)
    if as_json:
        print_json(result)
    else:
        print_facts("Evaluation", result)


def _flat(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """A line for every score, the reference's below the model's."""
    return {
        f"{'reference ' if which != 'tasks' else ''}{task} {metric}": value
        for which, found in scores.items()
        for task, metrics in found.items()
        for metric, value in metrics.items()
    }


def _agreement(found: Agreement, reference: str) -> dict[str, Any]:
    difference = found.difference
    return {
        "perplexity": found.perplexity.value,
        "tokens": found.perplexity.tokens,
        "windows": len(found.perplexity.nll),
        "reference": reference,
        "reference_perplexity": found.reference_perplexity.value,
        "perplexity_increase_percent": 100 * math.expm1(difference.mean),
        "perplexity_increase_error_percent": 100 * difference.error,
        "kl_nats": found.kl,
        "kl_error_nats": found.kl_error,
        "top1_agreement": found.top1,
    }


@bench.command("model")
def bench_model(
    checkpoint: options.Checkpoint,
    reference: Reference = None,
    version: Annotated[
        list[str] | None, typer.Option(help="auto, GEMV or GEMM; repeatable.", show_default="all three")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Queries a version.")] = 3,
    device: options.Device = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Measure single-query latency of a model for each kernel version."""
    target = options.torch_device(device)
    from awq.bench.report import machine_facts
    from awq.kernels import pinned_version
    from awq.load import load_quantized
    from awq.source import find_source

    source = find_source(reference, trust_remote_code=trust_remote_code) if reference else None
    versions = [pinned_version(word, notice=True) or AUTO for word in version or (AUTO, *KERNEL_VERSIONS)]
    settings = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "seed": seed}
    load = partial(load_quantized, checkpoint, device=target, revision=revision, trust_remote_code=trust_remote_code)
    rows, refused = bench_versions(load, versions, **settings)
    if source:
        rows.append(bench_float(source.load, target, **settings))
    machine = machine_facts(target)
    if as_json:
        print_json({"machine": machine, "model": checkpoint, "rows": rows, "refused": refused})
        return
    for label, reason in refused.items():
        say(f"{label}: {reason}")
    title = f"One query of {prompt_tokens} + {new_tokens} tokens on {machine['device']}, torch {machine['torch']}"
    print_table(title, latency_columns(rows), map(latency_cells, rows))


def latency_columns(rows: Sequence[Latency]) -> tuple[str, ...]:
    peak = f"peak memory: {rows[0].peak_of}" if rows else "peak memory"
    return ("version", "TTFT [ms]", "ms/token p50", "p90", "p99", "tokens/s", "weights", peak)


def latency_cells(row: Latency) -> tuple[object, ...]:
    times = (row.ttft_ms, row.token_ms_p50, row.token_ms_p90, row.token_ms_p99, row.tokens_per_second)
    return row.label, *times, format_bytes(row.weight_bytes), format_bytes(row.peak_bytes)


def bench_versions(
    load: Callable[..., Any], versions: Sequence[str], **settings: int
) -> tuple[list[Latency], dict[str, str]]:
    """A row for each version that runs here, and why the others do not; `load(version=...)` gives the model."""
    from awq.bench.generation import measure_generation

    rows: list[Latency] = []
    refused: dict[str, str] = {}
    for version in versions:
        try:
            model = load(version=version)
        except KernelNotSupportedError as error:
            refused[version] = str(error)
            continue
        rows.append(measure_generation(model, version, **settings))
        del model
        gc.collect()
    return rows, refused


def bench_float(load: Callable[[torch.dtype], Any], device: torch.device, **settings: int) -> Latency:
    """The row of the float model that `load` returns, in the half precision that is fast on the device."""
    import torch

    from awq.bench.generation import measure_generation

    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    label = f"float ({str(dtype).removeprefix('torch.')})"
    return measure_generation(load(dtype).to(device), label, **settings)


bench.command("kernels")(bench_kernels)
