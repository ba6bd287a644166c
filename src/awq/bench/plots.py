"""The figures: perplexity of each recipe, salience of channels, latency by rows, loss by linear."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq.bench.files import check_writable
from awq.bench.results import DENSE, KernelBench, KernelRow, crossover, panels
from awq.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, FAINT = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN = "#2563eb", "#ea580c", "#0f9d76"
VERSION_STYLE: dict[str, dict[str, Any]] = {
    "GEMV": {"color": BLUE, "marker": "o"},
    "GEMM": {"color": ORANGE, "marker": "s"},
    DENSE: {"color": MUTED, "marker": "", "linestyle": "--"},
}
_MOST_PANELS, _PANELS_A_LINE = 12, 4
_WIDE_TICKS = 10  # so many fit beside each other
_FORMATS = (".png", ".svg", ".pdf")
_FLOOR = "its bytes at the read ceiling"


@dataclass(frozen=True)
class Salience:
    """One linear's input channels: all float [in_features] lists, `kept` the indices stored in fp16."""

    linear: str
    mean_abs: Sequence[float]
    cost: Sequence[float]
    kept: Sequence[int]


def plot_perplexity(path: Path, values: Mapping[str, tuple[float, float]], subtitle: str, baseline: str) -> None:
    """A dot for each recipe. values: label -> (perplexity, standard error of the difference to `baseline`)."""
    figure = _figure(8.4, 1.7 + 0.62 * len(values), "Perplexity after quantization", subtitle)
    axes = _axes(figure)
    floor = values[baseline][0]
    axes.axvline(floor, color=MUTED, linewidth=1, linestyle="--", zorder=1)
    for row, (label, (value, error)) in enumerate(values.items()):
        color = MUTED if label == baseline else (ORANGE, BLUE, GREEN)[(row - 1) % 3]
        axes.plot([floor, value], [row, row], color=color, linewidth=3, alpha=0.25, solid_capstyle="round", zorder=2)
        axes.errorbar(value, row, xerr=error or None, color=color, marker="o", markersize=9, capsize=3, zorder=3)
        change = "" if label == baseline else f"   {100 * (value / floor - 1):+.1f} %"
        label_box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        place = {"xytext": (0, 11), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.2f}{change}", (value, row), color=INK, bbox=label_box, **place)  # type: ignore[arg-type]
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelsize=10.5)
    axes.set_xlabel("perplexity on held-out text (lower is better); bars: standard error of the paired difference")
    _save(figure, path)


def plot_salience(path: Path, salience: Salience, subtitle: str) -> None:
    """Channels by their activation (above) and by what rounding them costs (below), the kept ones marked."""
    kept, count = set(salience.kept), len(salience.mean_abs)
    title = f"{len(kept)} of {count} input channels of {salience.linear} stay in fp16"
    figure = _figure(9.6, 6.2, title, subtitle)
    panels = figure.subplots(2, 1, sharex=True)
    labels = ("mean |x| of the channel", "expected output error\n$G_{jj}\\,\\Vert\\Delta W_j\\Vert^2$")
    rest = [channel for channel in range(count) if channel not in kept]
    for axes, values, label in zip(panels, (salience.mean_abs, salience.cost), labels, strict=True):
        _style(axes)
        axes.set_yscale("log")
        axes.scatter(rest, [values[c] for c in rest], s=11, color=MUTED, alpha=0.55, linewidths=0, label="int4")
        axes.scatter(
            sorted(kept),
            [values[c] for c in sorted(kept)],
            s=46,
            color=ORANGE,
            edgecolors="white",
            linewidths=0.8,
            zorder=3,
            label="int4 and fp16 residual",
        )
        axes.set_ylabel(label)
    panels[0].legend(loc="upper right", frameon=False, ncols=2, bbox_to_anchor=(1.0, 1.13), borderaxespad=0)
    panels[1].set_xlabel("input channel")
    panels[1].set_xlim(-count * 0.01, count * 1.01)
    _save(figure, path)


def plot_kernels(path: Path, bench: KernelBench, subtitle: str) -> None:
    """Latency by rows of each version, a panel a linear: the crossover, and what reading alone would take, marked."""
    shown = panels(bench.rows)
    lines = -(-len(shown) // _PANELS_A_LINE)
    columns = -(-len(shown) // lines)
    figure = _figure(max(7.2, 4.3 * columns), 0.9 + 3.7 * lines, "Latency of one linear by rows", subtitle)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (label, rows) in zip(grid.flat, shown.items(), strict=False):
        _kernel_panel(axes, rows, label, bench.ceiling_gbs)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("median latency [µs]")
    grid[0][0].legend(frameon=False, loc="upper left")
    _save(figure, path)


def plot_losses(path: Path, linears: Mapping[str, Mapping[str, Any]], subtitle: str) -> None:
    """Relative output error of every linear: plain rounding, AWQ, AWQ with outlier channels; a panel a kind."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in linears.items():
        kinds.setdefault(_kind(name), []).append(entry)
    shown = dict(list(kinds.items())[:_MOST_PANELS])
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    title = "Output error of each linear on the calibration text"
    figure = _figure(3.3 * columns + 0.6, 2.5 * lines + 1.3, title, subtitle)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes, (kind, entries) in zip(grid.flat, shown.items(), strict=False):
        _loss_panel(axes, kind, entries)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("loss / output power")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", frameon=False, ncols=3)
    _save(figure, path)


def _kernel_panel(axes: Axes, rows: Sequence[KernelRow], label: str, ceiling_gbs: float | None) -> None:
    _style(axes)
    counts = sorted({row.rows for row in rows})
    pdl = any(row.pdl for row in rows)
    for version, style in VERSION_STYLE.items():
        of_version = [row for row in rows if row.version == version and row.pdl == (pdl and version != DENSE)]
        points = sorted(of_version, key=lambda row: row.rows)
        if points:
            name = f"{version} ({points[0].dtype})" if version == DENSE else version
            x = [row.rows for row in points]
            axes.plot(x, [row.median_us for row in points], label=name, linewidth=2, markersize=5, **style)
            spread = [row.p10_us for row in points], [row.p90_us for row in points]
            axes.fill_between(x, *spread, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    # The bands of a busy machine must not dwarf the lines.
    lowest, highest = min(row.median_us for row in rows), max(row.median_us for row in rows)
    floors = _floors(rows, ceiling_gbs)
    if floors:
        axes.plot(list(floors), list(floors.values()), color=GREEN, linewidth=1.4, linestyle="-.", label=_FLOOR)
        lowest = min(lowest, *floors.values())
    axes.set_ylim(lowest / (2.6 if floors else 1.7), highest * 1.7)
    wide = len(counts) > _WIDE_TICKS
    ticks = [count for count in counts if not wide or count.bit_count() == 1]
    axes.set_xticks(ticks, [str(count) for count in ticks], rotation=90 if wide else 0)
    axes.minorticks_off()
    axes.set_xlabel("rows of x")
    group = "" if "group" in label else f", group {rows[0].group_size}"
    axes.set_title(f"N x K = {label}{group}", fontsize=10, color=INK, loc="left")
    crossing = crossover(rows)
    if crossing is not None:
        _mark_crossover(axes, crossing, left=crossing > counts[len(counts) // 2])


def _floors(rows: Sequence[KernelRow], ceiling_gbs: float | None) -> dict[int, float]:
    """Microseconds of moving the quantized linear's bytes at the ceiling, by rows."""
    if not ceiling_gbs:
        return {}
    quantized = sorted((row for row in rows if row.version != DENSE), key=lambda row: row.rows)
    return {row.rows: row.read_bytes / ceiling_gbs / 1e3 for row in quantized}


def _mark_crossover(axes: Axes, crossing: int, left: bool) -> None:
    axes.axvline(crossing, color=INK, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        f"GEMM faster\nfrom {crossing} row{'s' * (crossing > 1)}",
        (crossing, 0.03),
        (-4 if left else 4, 0),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom",
        fontsize=9,
        color=INK,
    )


def _loss_panel(axes: Axes, kind: str, entries: Sequence[Mapping[str, Any]]) -> None:
    _style(axes)
    series = (
        ("loss_rounding", "plain rounding", ORANGE),
        ("loss", "AWQ", BLUE),
        ("loss_with_outliers", "AWQ + fp16 channels", GREEN),
    )
    for key, label, color in series:
        values = [math.nan if entry[key] is None else float(entry[key]) for entry in entries]
        axes.plot(range(len(values)), values, color=color, label=label, linewidth=1.4, marker="o", markersize=2.5)
    axes.set_yscale("log")
    axes.set_title(kind, fontsize=10, color=INK, loc="left")
    axes.set_xlabel("block")


def _kind(name: str) -> str:
    """A linear's name without its block: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return re.sub(r"^.*?\.\d+\.", "", name, count=1)


def check_plot(path: Path) -> None:
    """MissingDependencyError or ConfigError where `path` cannot be drawn, before anything is measured."""
    require_matplotlib()
    if path.suffix.lower() not in _FORMATS:
        known = f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise ConfigError(f"{path} is no name for a plot: let it end in {known}.")
    check_writable(path)


def require_matplotlib() -> type[Figure]:
    """MissingDependencyError where plots cannot be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib: run `pip install matplotlib`.") from error
    return Figure


def _figure(width: float, height: float, title: str, subtitle: str) -> Figure:
    figure = require_matplotlib()(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(rect=(0.06 / width, 0, 1 - 0.16 / width, 1 - 0.78 / height))  # type: ignore[union-attr,call-arg]
    figure.text(0.12 / width, 1 - 0.14 / height, title, va="top", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.12 / width, 1 - 0.46 / height, subtitle, va="top", fontsize=9, color=MUTED)
    return figure


def _axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    _style(axes)
    return axes


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(visible=True, color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
