"""`awq bench kernels`: what to time from the options, and the table of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.output import print_facts, print_json, print_table, say
from awq.config import KERNEL_VERSIONS, canonical_version
from awq.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from awq.bench.kernels.shapes import Setting, Shape
    from awq.bench.results import KernelBench, KernelRow


Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="NxK|MODEL", help="Output x input features, or a model's linears.", show_default="a few"),
]
Rows = Annotated[
    list[str] | None, typer.Option(metavar="N,N-N...", help="Rows of x.", show_default="powers of 2 to 256")
]
Groups = Annotated[
    list[int] | None, typer.Option(help="Input channels that share a scale; -1: all.", show_default="64")
]
Dtypes = Annotated[list[str] | None, typer.Option(help="fp16 or bf16.", show_default="fp16 on a GPU, else bf16")]
Ratios = Annotated[list[float] | None, typer.Option(help="Share of channels kept in fp16, to 0.05.", show_default="0")]
Peers = Annotated[list[str] | None, typer.Option(help="Another project's kernel.", show_default="all installed")]


def bench_kernels(
    shape: Shapes = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Also 30 shapes beside the models'.")] = False,
    rows: Rows = None,
    version: Annotated[list[str] | None, typer.Option(help="GEMV or GEMM.", show_default="both")] = None,
    group_size: Groups = None,
    dtype: Dtypes = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Codes around 8, without zero points.")] = False,
    outlier_ratio: Ratios = None,
    peer: Peers = None,
    peers: Annotated[bool, typer.Option(help="Time other projects' kernels too.")] = True,
    overheads: Annotated[bool, typer.Option("--overheads", help="Also calls' CPU time, first use, repacking.")] = False,
    seconds: Annotated[float, typer.Option(min=0.001, help="Time spent on each figure on a CPU.")] = 0.2,
    device: options.Device = "auto",
    csv: Annotated[Path | None, typer.Option(help="Write the rows into this CSV file; a GPU's are appended.")] = None,
    plot: options.Plot = None,
    as_json: options.Json = False,
) -> None:
    """Measure one linear by rows for both kernel versions, and where GEMM overtakes GEMV.

    The options that name a value may be repeated; every combination is timed.
    """
    target = options.torch_device(device)
    from awq.bench.kernels.overheads import measure_overheads
    from awq.bench.kernels.peers import find_peers
    from awq.bench.kernels.run import bench_settings
    from awq.bench.kernels.shapes import SWEEP, default_shapes, find_shapes
    from awq.bench.plots import check_plot, plot_kernels
    from awq.bench.report import kernels_file, machine_facts, write_kernels

    shapes = [*find_shapes(shape or ()), *(SWEEP if sweep else ())] or default_shapes(target)
    groups, ratios = group_size or [64], outlier_ratio or [0.0]
    settings = _settings(shapes, groups, _dtypes(dtype, target), ratios, not symmetric)
    versions = [canonical_version(word) for word in version or KERNEL_VERSIONS]
    counts, others = _counts(rows), find_peers(peer) if peers else ()
    file = kernels_file(csv, target) if csv else None
    if plot:
        check_plot(plot)
    extra = measure_overheads(target) if overheads else None
    found = bench_settings(settings, target, rows=counts, versions=versions, peers=others, seconds=seconds)
    machine = machine_facts(target)
    if file:
        write_kernels(file, found, machine)
    if plot:
        plot_kernels(plot, found, f"{machine['device']}, torch {machine['torch']}")
    if as_json:
        print_json({"machine": machine, **found.to_dict(), **({"overheads": extra} if extra else {})})
    else:
        _show_kernels(found, machine, extra)


def _settings(
    shapes: Sequence[Shape], groups: Sequence[int], dtypes: Sequence[torch.dtype], ratios: Sequence[float], zeros: bool
) -> list[Setting]:
    """Every combination; ConfigError for one that means nothing."""
    from awq.bench.kernels.shapes import Setting

    found = product(shapes, groups, dtypes, ratios)
    return [Setting(shape, group, dtype, zeros, ratio) for shape, group, dtype, ratio in found]


def _dtypes(names: Sequence[str] | None, device: torch.device) -> list[torch.dtype]:
    from awq.bench.kernels.run import default_dtype
    from awq.bench.kernels.shapes import DTYPE_NAMES

    known = {name: dtype for dtype, short in DTYPE_NAMES.items() for name in (short, str(dtype).removeprefix("torch."))}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"dtype {name!r} is unknown: use {' or '.join(DTYPE_NAMES.values())}.")
    return [known[name] for name in names or ()] or [default_dtype(device)]


def _counts(words: Sequence[str] | None) -> tuple[int, ...]:
    """Row counts from "1,2,16" and "1-8", ascending; ConfigError for what is no count."""
    from awq.bench.kernels.run import ROWS

    if not words:
        return ROWS
    counts: set[int] = set()
    for part in ",".join(words).split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
            raise ConfigError(f"rows {part!r} is no row count: write 16, 1,2,4 or 1-8.")
        counts.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(counts))


def _show_kernels(found: KernelBench, machine: dict[str, Any], overheads: dict[str, Any] | None) -> None:
    from awq.bench.results import panels

    for name, reason in (found.refused | found.left_out).items():
        say(f"{name}: {reason}")
    columns, cells = kernel_table(found)
    print_table(f"One linear on {machine['device']}, torch {machine['torch']}", columns, cells)
    if found.ceiling:
        start, end = found.ceiling.start_gbs, found.ceiling.end_gbs
        typer.echo(f"Read ceiling: {start:.0f} GB/s before, {end:.0f} after; shares are of the higher one.")
    for label, rows in panels(found.rows).items():
        typer.echo(f"{label}: {_verdict(rows)}.")
    for label in found.slow:
        typer.echo(f"{label}: one row takes more than 1.5 times reading its bytes at the ceiling and 2 µs.")
    for note in found.notes:
        typer.echo(f"Note: {note}.")
    for name, figures in (overheads or {}).items():
        print_facts(name.replace("_", " "), _flat(figures))


def _flat(figures: Mapping[str, Any]) -> dict[str, object]:
    """The names of nested figures joined."""
    flat: dict[str, object] = {}
    for name, value in figures.items():
        nested = _flat(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if nested is None else {f"{name} {inner}": each for inner, each in nested.items()}
    return flat


def kernel_table(found: KernelBench) -> tuple[list[str], list[list[object]]]:
    """Columns and cells; those of the cold measurement only where there is one."""
    columns = ["N x K", "rows", "version", "kernel", "median [µs]", "p10", "p90"]
    cells: list[list[object]] = [
        [r.shape, r.rows, r.version, r.kernel, r.median_us, r.p10_us, r.p90_us] for r in found.rows
    ]
    if found.ceiling is None:
        return columns, cells
    columns += ["group", "dtype", "pdl", "% of ceiling", "x dense", "error"]
    for r, line in zip(found.rows, cells, strict=True):
        share = r.of_ceiling(found.ceiling_gbs)
        line += [r.group_size, r.dtype, "yes" if r.pdl else "no", share, r.over_dense, r.error]
    return columns, cells


def _verdict(rows: Sequence[KernelRow]) -> str:
    from awq.bench.results import crossover, gemv_gain

    crossing, gain = crossover(rows), gemv_gain(rows)
    verdict = f"GEMM is faster from {crossing} rows on" if crossing else "GEMM is not faster at any number of rows"
    return verdict if gain is None else f"{verdict}; for one row GEMV takes {gain:.0f} % less time"
