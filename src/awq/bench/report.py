"""What a figure needs beside it: the machine, the versions, the commit; and rows as CSV."""

from __future__ import annotations

import csv
import io
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from awq import __version__


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
    """The commit of the checkout that this file lies in, "-dirty" after it when that has changes, or None."""
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
