"""The command line of the ablation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from awq.bench.report import machine_facts
from awq.cli.options import torch_device
from awq.errors import AwqError
from benchmarks.ablation.measure import Bench
from benchmarks.ablation.several import each
from benchmarks.ablation.table import Row, identity, insert, markdown, read_rows, show, write_rows
from benchmarks.ablation.variants import Variant, variants

RESULTS = Path(__file__).parents[1] / "results"
MACHINE = ("device", "torch", "transformers", "awq", "commit")

Text = Annotated[Path, typer.Option(exists=True, help="A text or jsonl file.")]
app = typer.Typer(add_completion=False, help="What each step of quantization is worth.", rich_markup_mode=None)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="The float model: a folder, a .gguf file or a hub id.")],
    prose: Text,
    code: Text,
    calibrate_prose: Text,
    calibrate_code: Text,
    prose_windows: Annotated[int, typer.Option(help="Windows of 1024 tokens; 0: all.")] = 12,
    code_windows: Annotated[int, typer.Option(help="The same for code; 0: all.")] = 6,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Blocks of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens a block.")] = 512,
    only: Annotated[str, typer.Option(help="Only rows whose section and name hold this pattern.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Rows at once: twelve for a small model on a large GPU.")] = 1,
    output: Annotated[Path | None, typer.Option(help="The CSV.", show_default="ablation-MODEL.csv")] = None,
) -> None:
    """Measure every row that the CSV does not have yet."""
    path = output or RESULTS / f"ablation-{Path(model).name.lower()}.csv"
    bench = Bench(
        folder=model,
        evaluation={"prose": (prose, prose_windows or None), "code": (code, code_windows or None)},
        calibration={"prose": calibrate_prose, "code": calibrate_code},
        device=torch_device(device),
        samples=samples,
        seq_len=seq_len,
        window=window,
    )
    machine = machine_facts(bench.device)
    facts = {name: machine[name] for name in MACHINE}
    rows = read_rows(path)
    known = {identity(row) for row in rows}
    wanted = [one for one in variants() if re.search(only, f"{one.section}: {one.name}")]
    with each(jobs, bench, partial(_measure, known=known, facts=facts), wanted) as measured:
        for new in measured:
            rows += [row for row in new if identity(row) not in known]
            if rows:
                write_rows(path, _in_order(rows))
    show(_in_order(rows))


@app.command()
def table(
    results: Annotated[Path, typer.Argument(exists=True, help="A CSV that `run` wrote.")],
    docs: Annotated[Path | None, typer.Option(exists=True, help="Put the tables into this document.")] = None,
) -> None:
    """Print the rows of a CSV as markdown, or put them between the marks of a document."""
    text = markdown(read_rows(results))
    if docs:
        insert(docs, text)
    else:
        typer.echo(text)


def _measure(bench: Bench, variant: Variant, known: set[tuple[str, ...]], facts: Row) -> list[Row]:
    """The rows of a variant; none where they are known, or the model does not allow them, which is said."""
    heads = [_head(bench, variant, name) for name in variant.rows]
    if all(identity(head) in known for head in heads):
        return []
    try:
        measured = list(bench.measure(variant))
    except AwqError as error:
        typer.echo(f"{variant.section}: {variant.name} is left out: {error}", err=True)
        return []
    date = {"date": datetime.now(UTC).date().isoformat()}
    rows = [head | figures | facts | date for head, figures in zip(heads, measured, strict=True)]
    for row in rows:
        typer.echo(f"{_line(row)}", err=True)
    return rows


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """As `variants` has them."""
    wanted = [_what(variant, name) for variant in variants() for name in variant.rows]
    places = {tuple(map(str, what.values())): place for place, what in enumerate(wanted)}
    return sorted(rows, key=lambda row: places.get(tuple(str(row[column]) for column in wanted[0]), len(places)))


def _head(bench: Bench, variant: Variant, name: str) -> dict[str, Any]:
    return _what(variant, name) | {
        "samples": bench.samples,
        "seq_len": bench.seq_len,
        "windows": "+".join(str(windows or "all") for _, windows in bench.evaluation.values()),
    }


def _what(variant: Variant, name: str) -> dict[str, Any]:
    config = variant.config
    return {
        "section": variant.section,
        "model": variant.model,
        "name": name,
        "calibration": variant.calibration,
        "bits": config.bits if config else 32,
        "group_size": config.group_size if config else 0,
    }


def _line(row: Row) -> str:
    figures = " ".join(f"{name} {row[name]:.4g}" for name in row if name.endswith(("_ppl", "_kl_x1000")))
    what = f"{row['section']}: {row['name']}, {row['bits']} bits, group {row['group_size']}, {row['calibration']}"
    return f"{what}: {figures} ({row['seconds']:.1f} s)"


if __name__ == "__main__":
    app()
