import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from awq.bench.plots import Salience, plot_kernels, plot_losses, plot_perplexity, plot_salience, require_matplotlib
from awq.bench.results import Ceiling, KernelBench, KernelRow
from awq.errors import MissingDependencyError

ROWS = [
    KernelRow(64, width, 64, 0, "bfloat16", rows, version, "cpu", base + rows, base, base + 2 * rows, 9)
    for width in (128, 256)
    for version, base in (("GEMV", 1.0), ("GEMM", 20.0), ("dense", 5.0))
    for rows in (1, 8, 64)
]


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_perplexity(tmp_path: Path) -> None:
    values = {"float": (19.65, 0.0), "plain rounding": (24.7, 0.2), "AWQ": (21.8, math.nan)}
    plot_perplexity(tmp_path / "new" / "perplexity.png", values, "a machine", "float")
    assert is_picture(tmp_path / "new" / "perplexity.png")


@pytest.mark.parametrize("kept", [[], [1, 3]])
def test_salience(tmp_path: Path, kept: list[int]) -> None:
    plot_salience(tmp_path / "s.png", Salience("down_proj", [1, 2, 3, 9], [0, 4, 1, 81], kept), "a machine")
    assert is_picture(tmp_path / "s.png")


@pytest.mark.parametrize("rows", [ROWS, ROWS[:9], [row for row in ROWS if row.version != "GEMM"]])
def test_kernels(tmp_path: Path, rows: list[KernelRow]) -> None:
    plot_kernels(tmp_path / "k.png", KernelBench(rows, {}), "a machine")
    assert is_picture(tmp_path / "k.png")


@pytest.mark.parametrize("settings", [1, 4, 6])
def test_cold_kernels(tmp_path: Path, settings: int) -> None:
    """A grid of panels, each with the line of the read ceiling; both ways of launching were timed."""
    rows = [
        replace(row, in_features=64 * setting, pdl=pdl, read_bytes=9000)
        for setting in range(1, settings + 1)
        for row in ROWS[:9]
        for pdl in ((False,) if row.version == "dense" else (False, True))
    ]
    plot_kernels(tmp_path / "k.png", KernelBench(rows, {}, Ceiling(4, 5)), "a machine")
    assert is_picture(tmp_path / "k.png")


@pytest.mark.parametrize("kinds", [1, 4, 7, 30])
def test_losses(tmp_path: Path, kinds: int) -> None:
    losses = {"loss_rounding": 0.01, "loss": 0.005, "loss_with_outliers": 0.004}
    linears = {f"model.layers.{layer}.kind_{kind}": losses for layer in range(3) for kind in range(kinds)}
    plot_losses(tmp_path / "l.png", linears, "a model")
    assert is_picture(tmp_path / "l.png")


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install matplotlib"):
        require_matplotlib()
