import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.cli.run import refused, run, run_json


def test_as_json(quantized: Path) -> None:
    found = run_json("inspect", quantized)
    assert (found["bits"], found["group_size"], found["zero_point"], found["layout"]) == (4, 32, True, "gemm")
    assert len(found["linears"]) == 14
    assert (found["outlier_ratio"], found["effort"]) == (0.05, "fast")
    assert found["calibration"].endswith("built-in prose")
    assert found["not_converted"] == {"lm_head": "outside the blocks"}
    for name, linear in found["linears"].items():
        assert linear["name"] == name
        assert linear["rounding"] in ("plain", "compensated")
        assert linear["loss"] <= linear["loss_rounding"]
        assert linear["loss_with_outliers"] > 0
    assert found["fp16_channels"] == sum(linear["outliers"] for linear in found["linears"].values())


def test_what_the_outlier_budget_spent(quantized: Path) -> None:
    found = run_json("inspect", quantized)
    with safe_open(quantized / "outliers" / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    spent = found["outliers"]
    assert spent["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert spent["channels"] == found["fp16_channels"] == sum(tensor.numel() for tensor in tensors if tensor.ndim == 1)
    assert spent["linears"] == len(tensors) // 2
    shown = run("inspect", quantized).stdout
    assert f"{spent['channels']} in {spent['linears']} linears, 0.0 MB" in shown


def test_a_report_of_conversion_alone(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    shutil.copytree(quantized, folder)
    (folder / "awq_report.json").write_text('{"converted_from": "gemv"}')
    found = run_json("inspect", folder)
    assert len(found["linears"]) == 14 and found["outliers"] is None
    assert run("inspect", folder).exit_code == 0


@pytest.mark.parametrize(
    "report",
    [
        {"linears": []},
        {"linears": {"a": {}}},
        {"linears": {"a": 5}},
        {"recipe": 7},
        {"recipe": {"config": "x"}},
        {"recipe": {"calibration": {"sources": [1]}}},
        {"recipe": {"calibration": {"shape": "x"}}},
        {"not_converted": {"a": {}}},
        {"source": 5},
    ],
)
def test_a_damaged_report_is_one_sentence(quantized: Path, tmp_path: Path, report: dict[str, object]) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(quantized, folder)
    (folder / "awq_report.json").write_text(json.dumps(report))
    assert "awq_report.json is damaged" in refused("inspect", folder)


def test_what_a_terminal_acts_upon_is_not_shown(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coloured"
    shutil.copytree(quantized, folder)
    report = json.loads((folder / "awq_report.json").read_text())
    report["linears"]["model.layers.1.mlp.up_proj"]["scaled_by"] = "\x1b[2Jnorm"
    (folder / "awq_report.json").write_text(json.dumps(report))
    shown = run("inspect", folder).stdout
    assert "\x1b" not in shown and "[2Jnorm" in shown


def test_as_a_table(quantized: Path) -> None:
    shown = run("inspect", quantized).stdout
    first, second = (shown.index(f"model.layers.{layer}.mlp.up_proj") for layer in (0, 1))
    assert first < second
    assert "group size" in shown


def test_plot(quantized: Path, tmp_path: Path) -> None:
    assert run("inspect", quantized, "--plot", tmp_path / "loss.png").exit_code == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_losses_that_could_not_be_measured(quantized: Path, tmp_path: Path) -> None:
    """Activations that are not finite leave null in the report."""
    folder = tmp_path / "broken"
    shutil.copytree(quantized, folder)
    report = json.loads((folder / "awq_report.json").read_text())
    broken = report["linears"]["model.layers.1.mlp.up_proj"]
    broken |= dict.fromkeys(("loss_rounding", "loss", "loss_with_outliers")) | {
        "fallback": "activations are not finite"
    }
    (folder / "awq_report.json").write_text(json.dumps(report))
    found = run_json("inspect", folder)
    assert found["fallbacks"] == 1 and found["mean_loss"] > 0
    shown = run("inspect", folder, "--plot", tmp_path / "loss.png").stdout
    assert "activations" in shown and "1 outside the blocks" in shown


@pytest.fixture
def foreign(quantized: Path, tmp_path: Path) -> Path:
    """A checkpoint of another tool: no report beside it."""
    folder = tmp_path / "foreign"
    shutil.copytree(quantized, folder)
    (folder / "awq_report.json").unlink()
    return folder


def test_a_checkpoint_of_another_tool(foreign: Path) -> None:
    found = run_json("inspect", foreign)
    assert len(found["linears"]) == 14
    assert all(linear["loss"] is None for linear in found["linears"].values())
    assert run("inspect", foreign).exit_code == 0


def test_no_plot_without_a_report(foreign: Path, tmp_path: Path) -> None:
    assert "awq_report.json" in refused("inspect", foreign, "--plot", tmp_path / "loss.png")
    (foreign / "awq_report.json").write_text('{"converted_from": "gemv"}')
    assert "awq_report.json" in refused("inspect", foreign, "--plot", tmp_path / "loss.png")
