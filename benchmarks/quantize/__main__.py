"""How long quantizing takes, from reading to the written checkpoint, and how much memory: a row a run.

Under torchrun its processes work together, and the first prints the row.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from awq.bench.report import machine_facts
from awq.cli.options import quiet_libraries, torch_device
from awq.config import QuantConfig
from awq.errors import AwqError
from awq.pipeline.recipe import quantize_folder
from awq.processes import own_device
from benchmarks.quantize.model import SHAPES, write_model

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def run(
    shape: Annotated[str, typer.Argument(help=f"{', '.join(SHAPES)}, or a float model's folder.")],
    folder: Annotated[Path, typer.Option(help="Where random models and outputs go.")] = Path("/tmp/awq-bench"),
    blocks: Annotated[int | None, typer.Option(help="Only so many blocks of a shape.")] = None,
    effort: Annotated[str, typer.Option(help="fast, balanced or max.")] = "balanced",
    samples: Annotated[int, typer.Option(help="Blocks of calibration text.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens a block.")] = 512,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the model from the page cache before.")] = False,
    gpu_memory: Annotated[str | None, typer.Option(help='Such as "8GiB".')] = None,
    host_memory: Annotated[str | None, typer.Option(help='Such as "8GiB".')] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    rows: Annotated[Path | None, typer.Option(help="A jsonl file to add the row to.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the output.")] = False,
) -> None:
    """Quantize once and print the row."""
    quiet_libraries()
    place, name = own_device(torch_device(device)), f"{Path(shape).name}-{blocks or 'all'}"
    source, output = folder / name if shape in SHAPES else Path(shape), folder / f"{name}-{effort}"
    first = os.environ.get("RANK", "0") == "0"
    if first:  # the others wait for it when they join
        if shape in SHAPES:
            write_model(source, shape, blocks)
        shutil.rmtree(output, ignore_errors=True)
        (evict if cold else warm)(source)
    start = time.monotonic()
    config = QuantConfig(effort=effort, group_size=None)
    limits: dict[str, Any] = {"gpu_memory": gpu_memory, "host_memory": host_memory}
    finished = quantize_folder(source, output, config, samples=samples, seq_len=seq_len, device=device, **limits)
    seconds = time.monotonic() - start
    if not first:
        return
    row = {
        "model": name,
        "effort": effort,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "tokens": samples * seq_len,
        "page_cache": "cold" if cold else "warm",
        "seconds": round(seconds, 2),
        "stages": {stage: round(taken, 2) for stage, taken in finished.seconds.items()},
        "before": round(seconds - sum(finished.seconds.values()), 2),
        "memory": {**finished.memory, **reserved(place)},
        "limits": limits,
        "size_bytes": finished.size_bytes,
        "machine": machine_facts(place),
    }
    if not keep:
        shutil.rmtree(output)
    typer.echo(json.dumps(row, indent=2))
    if rows:
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def reserved(place: torch.device) -> dict[str, int]:
    """What torch held of the GPU at the peak, its own gaps among it."""
    return {"gpu_reserved": torch.cuda.max_memory_reserved(place)} if place.type == "cuda" else {}


def evict(source: Path) -> None:
    """Drop the files from the page cache, as far as they are on the disk."""
    for path in source.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(source: Path) -> None:
    """Read the files into the page cache."""
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


if __name__ == "__main__":
    try:
        app()
    except AwqError as error:
        raise SystemExit(f"error: {error}") from None
