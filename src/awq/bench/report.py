"""What a figure needs beside it: the machine, the versions, the commit; and rows as CSV."""

from __future__ import annotations

import csv
import io
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from awq import __version__
from awq.bench.files import check_writable, refusing
from awq.bench.generation import Latency
from awq.bench.results import DENSE, KernelBench, KernelRow, dtype_name
from awq.errors import ConfigError
from awq.hardware import driver_version

# One line a kernel, linear and row count, over runs and machines.
KERNEL_COLUMNS = (
    *("gpu", "driver", "torch", "commit", "date", "kernel", "N", "K", "rows", "group", "dtype", "zero_point"),
    *("outlier_ratio", "pdl", "us_p50", "us_p10", "us_p90", "rel_error", "ceiling_gbs", "cublas_us"),
)
# One line a model, version and batch. tier: how it generated; read_floor_fraction: of the read ceiling, of a step.
GENERATION_COLUMNS = (
    *("gpu", "driver", "torch", "commit", "date", "model", "tier", "version", "batch", "prompt_tokens", "new_tokens"),
    *("ms_per_token_p50", "ms_per_token_p90", "ttft_ms", "tokens_per_second", "read_floor_fraction", "peak_bytes"),
)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Names and versions that a measurement on `device` depends on; `commit` is None outside a git checkout."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver_version() if device.type == "cuda" else None,
        "transformers": transformers.__version__,
        "awq": __version__,
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The product name: "NVIDIA H100 80GB HBM3", or the processor and the threads that torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's product name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this file lies in, "-dirty" after it when that has changes, or None.

    AWQ_COMMIT says it where the files came without their history.
    """
    if named := os.environ.get("AWQ_COMMIT"):
        return named
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None  # installed; a checkout further up is somebody else's
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV text, the keys of the first as its header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def kernels_file(path: Path, device: torch.device) -> Path:
    """The CSV to write: `path`, or the device's own file in that folder.

    ConfigError where it cannot be written, or where a GPU's rows cannot be appended to what the file holds.
    """
    return _own_file(path, device, "kernels", KERNEL_COLUMNS)


def generation_file(path: Path, device: torch.device) -> Path:
    """The same for rows of generation."""
    return _own_file(path, device, "generation", GENERATION_COLUMNS)


def _own_file(path: Path, device: torch.device, kind: str, columns: Sequence[str]) -> Path:
    with refusing(path):
        if path.is_dir():
            short = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).removeprefix("nvidia-").strip("-")
            path /= f"{kind}-{short}.csv"
        check_writable(path)
        if device.type == "cuda" and path.exists():
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                header = next(csv.reader(file), None)
            if header and tuple(header) != columns:
                raise ConfigError(f"{path} has other columns than {kind} rows have: give another file.")
    return path


def write_kernels(path: Path, found: KernelBench, machine: Mapping[str, Any]) -> None:
    """Append a GPU's rows under KERNEL_COLUMNS, the dense linear as a column of the others; else write all anew."""
    if machine["device_type"] != "cuda":
        path.write_text(to_csv([asdict(row) | dict(machine) for row in found.rows]), encoding="utf-8")
        return
    common = _where(machine) | {"ceiling_gbs": _digits(found.ceiling_gbs)}
    _append(path, KERNEL_COLUMNS, [common | _kernel_line(row) for row in found.rows if row.version != DENSE])


def write_generation(path: Path, model: str, rows: Sequence[Latency], machine: Mapping[str, Any]) -> None:
    """Append rows under GENERATION_COLUMNS, on a CPU too."""
    _append(path, GENERATION_COLUMNS, [_where(machine) | _generation_line(model, row) for row in rows])


def _where(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "gpu": machine["device"],
        "driver": machine["driver"] or "",
        "torch": machine["torch"],
        "commit": machine["commit"] or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
    }


def _append(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    empty = not path.exists() or not path.stat().st_size
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if empty:
            writer.writeheader()
        writer.writerows(rows)


def _generation_line(model: str, row: Latency) -> dict[str, Any]:
    return {
        "model": model,
        "tier": row.tier,
        "version": row.label,
        "batch": row.batch,
        "prompt_tokens": row.prompt_tokens,
        "new_tokens": row.new_tokens,
        "ms_per_token_p50": _digits(row.token_ms_p50),
        "ms_per_token_p90": _digits(row.token_ms_p90),
        "ttft_ms": _digits(row.ttft_ms),
        "tokens_per_second": _digits(row.tokens_per_second),
        "read_floor_fraction": _digits(row.read_floor_fraction),
        "peak_bytes": row.peak_bytes,
    }


def _kernel_line(row: KernelRow) -> dict[str, Any]:
    return {
        "kernel": row.kernel,
        "N": row.out_features,
        "K": row.in_features,
        "rows": row.rows,
        "group": row.group_size,
        "dtype": dtype_name(row.dtype),
        "zero_point": int(row.zero_point),
        "outlier_ratio": row.outlier_ratio,
        "pdl": int(row.pdl),
        "us_p50": _digits(row.median_us),
        "us_p10": _digits(row.p10_us),
        "us_p90": _digits(row.p90_us),
        "rel_error": "" if row.error is None else f"{row.error:.3e}",
        "cublas_us": _digits(row.dense_us),
    }


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.1f}"
