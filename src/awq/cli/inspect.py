"""`awq inspect`: what a checkpoint holds, linear by linear."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awq.cli import options
from awq.cli.output import format_bytes, print_facts, print_json, print_table
from awq.errors import CheckpointError

if TYPE_CHECKING:
    from awq.checkpoint.read import Checkpoint

TITLES = {"loss_rounding": "plain rounding", "loss": "AWQ", "loss_with_outliers": "AWQ + fp16 channels"}


def inspect(checkpoint: options.Checkpoint, plot: options.Plot = None, as_json: options.Json = False) -> None:
    """Show a checkpoint: settings, and each linear's loss."""
    from awq.checkpoint.read import open_checkpoint
    from awq.pretrained.source import find_folder

    if plot:
        from awq.bench.plots import check_plot

        check_plot(plot)
    opened = open_checkpoint(find_folder(checkpoint))
    report = opened.report or {}
    linears = {name: _describe(opened, name, report) for name in opened.linears}
    if plot:
        _plot(plot, opened, report)
    facts = _facts(opened, report)
    if as_json:
        rest = {"not_converted": report.get("not_converted", {}), "experts": coverage(report)}
        print_json({**facts, "linears": linears, **rest})
        return
    reasons = Counter(report.get("not_converted", {}).values())
    left_float = "; ".join(f"{count} {reason}" for reason, count in reasons.items()) or None
    shown = {"size_bytes": format_bytes(facts["size_bytes"]), "left_float": left_float}
    if kept := facts.pop("outliers"):
        shown["fp16_channels"] = spent(kept, facts["size_bytes"])
    print_facts(str(opened.path), facts | shown)
    columns = ("linear", "N x K", "bits", "group", "scaled by", "rounding", "fp16 channels")
    held_out = ", held out and read behind what is quantized" if facts.get("effort", "fast") != "fast" else ""
    title = f"Linears; losses are the output error over the output's power, on calibration text{held_out}"
    rows = (_row(linears[name]) for name in sorted(linears, key=_in_order))
    print_table(title, (*columns, *TITLES.values(), "fallback"), rows)
    if lists := coverage(report):
        title = "Experts: the calibration tokens that the router gave them"
        counts = ("experts", "number", "fewest tokens", "median", "most", "given none")
        print_table(title, counts, ((name, *lists[name].values()) for name in sorted(lists, key=_in_order)))


def spent(outliers: dict[str, int], size: int) -> str:
    """What the outlier budget was spent on, of a checkpoint of `size` bytes."""
    share = f"{format_bytes(outliers['bytes'])}, {outliers['bytes'] / size:.1%} of the checkpoint"
    return f"{outliers['channels']} in {outliers['linears']} linears, {share}"


def coverage(report: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By list of experts, how many there are, and how many calibration tokens they were given."""
    lists: dict[str, dict[int, dict[str, Any]]] = {}
    for name, linear in report.get("linears", {}).items():
        if "tokens" in linear and (place := re.fullmatch(r"(.+)\.(\d+)\..+", name)):
            lists.setdefault(place[1], {})[int(place[2])] = linear
    return {name: _coverage(list(experts.values())) for name, experts in lists.items()}


def _coverage(experts: list[dict[str, Any]]) -> dict[str, int]:
    tokens = sorted(expert["tokens"] for expert in experts)
    return {
        "experts": len(tokens),
        "fewest_tokens": tokens[0],
        "median_tokens": tokens[len(tokens) // 2],
        "most_tokens": tokens[-1],
        "given_none": tokens.count(0),
    }


def _facts(opened: Checkpoint, report: dict[str, Any]) -> dict[str, Any]:
    from awq.checkpoint.report import outlier_total, summarize

    files = [file for file in opened.path.rglob("*") if file.is_file()]
    architectures = opened.config.get("architectures")
    return {
        "architecture": architectures[0] if architectures and isinstance(architectures, list) else None,
        "bits": opened.quant.bits,
        "group_size": opened.quant.group_size,
        "zero_point": opened.quant.zero_point,
        "layout": opened.quant.layout,
        "size_bytes": sum(file.stat().st_size for file in files),
        **_recipe(report),
        **(summarize(report) if report.get("linears") else {"linears": len(opened.linears)}),
        "outliers": outlier_total(report) if report.get("linears") else None,
    }


def _recipe(report: dict[str, Any]) -> dict[str, Any]:
    recipe = report.get("recipe", {})
    sources = recipe.get("calibration", {}).get("sources", [])
    config = recipe.get("config", {})
    settings = {key: config.get(key) for key in ("outlier_ratio", "effort")}
    known = {"calibration": "; ".join(sources), **settings}
    return known if report else {}


def _describe(opened: Checkpoint, name: str, report: dict[str, Any]) -> dict[str, Any]:
    shape = opened.shape(name)
    known = report.get("linears", {}).get(name, {})
    return {
        "name": name,
        "out_features": shape.out_features,
        "in_features": shape.in_features,
        "bits": opened.quant.bits,
        "group_size": shape.group_size,
        **{key: known.get(key) for key in ("scaled_by", "rounding", "outliers", *TITLES, "fallback")},
    }


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _row(linear: dict[str, Any]) -> tuple[object, ...]:
    shape = f"{linear['out_features']} x {linear['in_features']}"
    keys = ("bits", "group_size", "scaled_by", "rounding", "outliers", *TITLES, "fallback")
    return linear["name"], shape, *(linear[key] for key in keys)


def _plot(path: Path, opened: Checkpoint, report: dict[str, Any]) -> None:
    if not report.get("linears"):
        raise CheckpointError(
            f"{opened.path} has no losses in an awq_report.json to plot: quantize its float model here."
        )
    from awq.bench.plots import plot_losses

    plot_losses(path, report["linears"], f"{opened.path.name}, W{opened.quant.bits} group {opened.quant.group_size}")
