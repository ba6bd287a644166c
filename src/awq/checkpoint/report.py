"""`awq_report.json`: what was done to each linear; checked when it is read, and summed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from awq.checkpoint.files import LONGEST_NAME, REPORT_FILE, read_json
from awq.errors import CheckpointError

LOSSES = ("loss_rounding", "loss", "loss_with_outliers")
_TEXT, _NUMBER = (str, type(None)), (int, float, type(None))
_LINEAR = {"scaled_by": _TEXT, "outliers": (int,), "fallback": _TEXT, **dict.fromkeys(LOSSES, _NUMBER)}
_LINEAR_OPTIONAL = {"rounding": _TEXT, "outlier_bytes": (int,), "tokens": (int,)}
_PARTS = ("recipe", "versions", "linears", "not_converted", "source")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a folder, None where another tool wrote it; CheckpointError for one of another shape."""
    report = read_json(folder, REPORT_FILE)
    if report is not None and not _is_sound(report):
        raise CheckpointError(f"{folder / REPORT_FILE} is damaged: copy it again, or remove it to do without it.")
    return report


def _is_sound(report: dict[str, Any]) -> bool:
    if not all(isinstance(report.get(part, {}), dict) for part in _PARTS):
        return False
    recipe, reasons = report.get("recipe", {}), report.get("not_converted", {})
    config, calibration = recipe.get("config", {}), recipe.get("calibration", {})
    if not (isinstance(config, dict) and isinstance(calibration, dict) and _all(str, reasons.values())):
        return False
    sources, shape = calibration.get("sources", []), calibration.get("shape", [])
    if not (isinstance(sources, list) and isinstance(shape, list) and _all(str, sources) and _all(int, shape)):
        return False
    linears = report.get("linears", {})
    return all(map(_is_linear, linears.values())) and all(len(name) <= LONGEST_NAME for name in linears)


def _is_linear(linear: object) -> bool:
    if not isinstance(linear, dict) or not _LINEAR.keys() <= linear.keys():
        return False
    kinds = (_LINEAR | _LINEAR_OPTIONAL).items()
    return all(isinstance(linear[key], kind) for key, kind in kinds if key in linear)


def _all(kind: type, values: Iterable[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


def outlier_total(report: dict[str, Any]) -> dict[str, int]:
    """What the outlier budget was spent on: linears with kept channels, these channels, and their bytes on disk.

    A channel that several linears keep counts for each; an older report does not know the bytes, which are 0 then.
    """
    kept = [linear for linear in report.get("linears", {}).values() if linear["outliers"]]
    return {
        "linears": len(kept),
        "channels": sum(linear["outliers"] for linear in kept),
        "bytes": sum(linear.get("outlier_bytes", 0) for linear in kept),
    }


def summarize(report: dict[str, Any]) -> dict[str, Any]:
    """Totals over the linears of a report; losses are means."""
    linears = report["linears"].values()
    return {
        "linears": len(linears),
        "scaled": sum(linear["scaled_by"] is not None for linear in linears),
        "fp16_channels": sum(linear["outliers"] for linear in linears),
        "fallbacks": sum(linear["fallback"] is not None for linear in linears),
        **{f"mean_{key}": _mean(linear[key] for linear in linears) for key in LOSSES},
    }


def worst(report: dict[str, Any], count: int) -> list[tuple[str, dict[str, Any]]]:
    """The linears that lost most, with their names, the worst first; those that could not be measured are left out."""
    measured = [
        (name, linear)
        for name, linear in report["linears"].items()
        if linear["loss_with_outliers"] is not None and math.isfinite(linear["loss_with_outliers"])
    ]
    return sorted(measured, key=lambda item: (-item[1]["loss_with_outliers"], item[0]))[:count]


def _mean(losses: Iterable[float | None]) -> float | None:
    """The mean of the losses that could be measured: activations that are not finite have none."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return sum(known) / len(known) if known else None
