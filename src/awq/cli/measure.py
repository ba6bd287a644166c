"""`awq eval` and `awq bench`: how good a checkpoint is, and how fast a model or one linear runs here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.generation import bench_model
from awq.cli.kernels import bench_kernels
from awq.cli.output import print_facts, print_json
from awq.errors import ConfigError

if TYPE_CHECKING:
    from awq.evaluate import Agreement

BUILT_IN_TEXT = "built-in evaluation prose"

bench = typer.Typer(help="Measure latency on this machine: a model, or one linear.", rich_markup_mode=None)


def evaluate(
    checkpoint: options.Checkpoint,
    reference: options.Reference = None,
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
    from awq.pretrained.source import find_source
    from awq.storage.load import load_dequantized

    asked = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    if limit and not asked:
        raise ConfigError("--limit is for the tasks of --tasks, which names none: for the text use --max-windows.")
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


bench.command("model")(bench_model)
bench.command("kernels")(bench_kernels)
