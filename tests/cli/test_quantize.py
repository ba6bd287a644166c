from pathlib import Path
from typing import Any

import pytest

from awq.checkpoint.read import open_checkpoint
from awq.config import QuantConfig
from awq.pipeline import recipe
from awq.pipeline.recipe import Finished
from tests.cli.run import run, run_json

LINEAR = {
    "scaled_by": None,
    "outliers": 2,
    "fallback": None,
    "loss_rounding": 0.4,
    "loss": 0.2,
    "loss_with_outliers": 0.1,
}
REPORT = {"recipe": {"config": {}}, "linears": {"a": LINEAR, "b": {**LINEAR, "scaled_by": "norm", "loss": 0.4}}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `quantize_folder` is called with; nothing is quantized."""
    seen: list[tuple[Any, ...]] = []

    def fake(*arguments: Any, **options: Any) -> Finished:
        seen.append((*arguments, options))
        return Finished(Path("out"), REPORT, ["mind the gap."], 3_500_000)

    monkeypatch.setattr(recipe, "quantize_folder", fake)
    return seen


def test_defaults(calls: list[tuple[Any, ...]]) -> None:
    assert run("quantize", "model", "--output", "out").exit_code == 0
    ((model, output, config, options),) = calls
    assert (model, output, config) == ("model", "out", QuantConfig())
    assert options == {
        "calibration": (),
        "text_column": "text",
        "samples": 128,
        "seq_len": 512,
        "seed": 0,
        "device": "auto",
        "revision": None,
        "trust_remote_code": False,
        "overwrite": False,
        "verify": "quick",
        "shard_size": "5GB",
        "gpu_memory": None,
        "host_memory": None,
        "whole": False,
    }


def test_every_flag_arrives(calls: list[tuple[Any, ...]]) -> None:
    flags = (
        "--bits 4 --group-size 64 --symmetric --version gemv --outlier-ratio 0.01 --effort balanced "
        "--modules-to-not-convert a --modules-to-not-convert b --calibration code --calibration more.txt "
        "--text-column body --samples 8 --seq-len 256 --device cpu --seed 3 --overwrite "
        "--revision v1 --trust-remote-code --verify full --shard-size 1GB --gpu-memory 8GiB --host-memory 16GiB --whole"
    )
    assert run("quantize", "model", "-o", "out", *flags.split()).exit_code == 0
    ((_, _, config, options),) = calls
    assert config == QuantConfig(4, 64, False, "gemv", ("a", "b"), 0.01, effort="balanced")
    assert options == {
        "calibration": ("code", "more.txt"),
        "text_column": "body",
        "samples": 8,
        "seq_len": 256,
        "seed": 3,
        "device": "cpu",
        "revision": "v1",
        "trust_remote_code": True,
        "overwrite": True,
        "verify": "full",
        "shard_size": "1GB",
        "gpu_memory": "8GiB",
        "host_memory": "16GiB",
        "whole": True,
    }


def test_another_name_of_a_version_is_said(calls: list[tuple[Any, ...]], recwarn: pytest.WarningsRecorder) -> None:
    run("quantize", "model", "--output", "out", "--version", "marlin")
    assert "'marlin' means GEMM" in str(recwarn.pop(UserWarning).message)


def test_result_as_json(calls: list[tuple[Any, ...]]) -> None:
    result = run_json("quantize", "model", "--output", "out")
    assert result["path"] == "out"
    assert result["size_bytes"] == 3_500_000
    assert result["warnings"] == ["mind the gap."]
    assert result["summary"] == {
        "linears": 2,
        "scaled": 1,
        "fp16_channels": 4,
        "fallbacks": 0,
        "mean_loss_rounding": pytest.approx(0.4),
        "mean_loss": pytest.approx(0.3),
        "mean_loss_with_outliers": pytest.approx(0.1),
    }


def test_result_as_a_table(calls: list[tuple[Any, ...]]) -> None:
    result = run("quantize", "model", "--output", "out")
    assert "3.5 MB" in result.stdout
    assert result.stderr == "warning: mind the gap.\n"


def test_a_tiny_model_twice(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", tiny, "-o", out, "--group-size", 32, "--samples", 4, "--seq-len", 64, "--device", "cpu")
    first, again = run_json(*command), run_json(*command)
    assert not first["already_complete"]
    assert again["already_complete"]
    assert first["summary"] == again["summary"]
    assert len(open_checkpoint(out).linears) == first["summary"]["linears"] == 14
    resized = run(*command, "--shard-size", "20KB").stdout
    assert resized.startswith("Already complete")
    assert "of the size that they had; --overwrite writes them anew" in resized
