"""The ablation on a tiny model: what the rows are made of, and the command with what it leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from awq.algorithm.inputs import moments
from awq.algorithm.inputs.propagate import Propagation
from awq.config import EFFORTS, QuantConfig
from awq.data.calibration import CalibrationSet, builtin_text
from awq.linear import QuantLinear
from awq.pipeline.recipe import quantize_model
from benchmarks.ablation.__main__ import app
from benchmarks.ablation.channels import round_but_keep
from benchmarks.ablation.measure import Bench
from benchmarks.ablation.rescale import rescale
from benchmarks.ablation.steps import STEPS
from benchmarks.ablation.table import BEGIN, END, SECTIONS
from benchmarks.ablation.variants import variants
from tests.tiny import random_tokens, save_tiny, tiny_llama

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablation")
    save_tiny(path / "tiny", dtype=torch.float32)
    texts = builtin_text("prose")
    for name, part in (
        ("prose", texts[:3]),
        ("code", texts[3:6]),
        ("calib-prose", texts[6:9]),
        ("calib-code", texts[9:12]),
    ):
        (path / f"{name}.txt").write_text("\n".join(part))
    return path


def call(folder: Path, *flags: str) -> Any:
    texts = [
        ("--prose", "prose"),
        ("--code", "code"),
        ("--calibrate-prose", "calib-prose"),
        ("--calibrate-code", "calib-code"),
    ]
    settings = ["--prose-windows", "3", "--code-windows", "2", "--window", "64", "--samples", "8", "--seq-len", "64"]
    files = [word for flag, name in texts for word in (flag, str(folder / f"{name}.txt"))]
    arguments = ["run", str(folder / "tiny"), *files, *settings, "--device", "cpu", *flags]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_variant_has_its_own_row_and_section() -> None:
    rows = [
        (v.section, v.model, name, v.calibration, v.config and (v.config.bits, v.config.group_size))
        for v in variants()
        for name in v.rows
    ]
    assert len(rows) == len(set(rows)) > 40
    assert {section for section, *_ in rows} == set(SECTIONS)
    assert {v.config.effort for v in variants() if v.config} == set(EFFORTS)


def test_rescaling_changes_weights_and_not_what_is_computed() -> None:
    model, original, tokens = tiny_llama(), tiny_llama(), random_tokens(2, 48)
    assert rescale(model, tokens[:1, :16]) == 2 * 4
    with torch.no_grad():
        after, before = (one(input_ids=tokens).logits for one in (model, original))
    assert (after - before).norm() < 1e-5 * before.norm()
    weights = zip(model.state_dict().items(), original.state_dict().values(), strict=True)
    changed = [name for (name, new), old in weights if not torch.equal(new, old)]
    assert len(changed) == 2 * 9  # two norms and seven linears a block


@pytest.mark.parametrize("criterion", ["activation", "weight", "random"])
def test_the_channels_of_a_criterion_are_kept(criterion: str) -> None:
    model, tokens = tiny_llama(), random_tokens(8, 64)
    seen: list[Tensor] = []
    hook = model.get_submodule(DOWN).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    weight = model.get_submodule(DOWN).weight.data.clone()
    config = QuantConfig(group_size=32, outlier_ratio=0.05)
    round_but_keep(model, [DOWN], tokens, config, criterion)
    rounded = model.get_submodule(DOWN).weight.data
    kept = set((rounded == weight).all(0).nonzero().flatten().tolist())
    assert len(kept) == round(0.05 * 128)
    assert (rounded - weight).abs().max() < 0.2 * weight.abs().max()
    if criterion == "activation":
        assert kept == set(seen[0].abs().mean((0, 1)).topk(6).indices.tolist())
    if criterion == "weight":
        assert kept == set(weight.norm(dim=0).topk(6).indices.tolist())


def test_every_step_left_out_changes_the_codes_and_is_put_back() -> None:
    tokens = CalibrationSet(random_tokens(14, 64), ("random",))
    before = Propagation.measure, Propagation.advance, moments.RESIDUAL
    codes: dict[str | None, Tensor] = {}
    for step, left_out in STEPS.items():
        model = tiny_llama()
        with left_out():
            quantize_model(model, QuantConfig(group_size=32, outlier_ratio=0), tokens, device="cpu", progress=False)
        linear = model.get_submodule(DOWN)
        assert isinstance(linear, QuantLinear)
        codes[step] = linear.packed.dequantize()
    assert before == (Propagation.measure, Propagation.advance, moments.RESIDUAL)
    assert len(codes) == 4
    assert all(not torch.equal(codes[None], other) for step, other in codes.items() if step)


def test_the_command_measures_resumes_and_fills_the_documentation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = folder / "rows.csv"
    shown = call(
        folder, "--only", "^(steps: (float|rounding|scale)|bits and groups: rounding)", "--output", str(results)
    )
    assert shown.exit_code == 0, shown.output
    rows = {(row["section"], row["name"], row["bits"], row["group_size"]): row for row in rows_of(results)}
    exact, rounding = rows["steps", "float", "32", "0"], rows["steps", "rounding", "4", "64"]
    assert float(exact["prose_kl_x1000"]) == pytest.approx(0, abs=1e-3)
    assert float(rounding["code_kl_x1000"]) < float(rows["bits and groups", "rounding", "3", "64"]["code_kl_x1000"])
    assert float(rounding["prose_dln_se_x100"]) > 0
    kept = rows["steps", "scale + clip + refit: fast, 1 % fp16 channels", "4", "64"]
    assert kept["prose_kl_x1000"] != rows["steps", "scale + clip + refit: fast", "4", "64"]["prose_kl_x1000"]
    assert "group size 128 does not divide" in " ".join(shown.stderr.split())
    assert exact["windows"] == "3+2" and len(json.loads(results.with_suffix(".json").read_text())) == len(rows)

    monkeypatch.setattr(Bench, "measure", lambda self, variant: pytest.fail(f"{variant.name} is measured again"))
    again = call(folder, "--only", "^steps: (float|rounding|scale)", "--output", str(results))
    assert again.exit_code == 0
    assert len(rows_of(results)) == len(rows)

    page = folder / "accuracy.md"
    page.write_text(f"# Accuracy\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    done = CliRunner().invoke(app, ["table", str(results), "--docs", str(page)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert page.read_text().startswith(f"# Accuracy\n\n{BEGIN}\n\n### Each step, 4 bits in groups of 64\n\n| ")
    assert page.read_text().endswith(f"|\n\n{END}\n\nThe end.\n")
    varied = page.read_text().partition("### Bits and groups")[2]
    assert "| rounding | 4 | 64 |" in varied and "| rounding | 3 | 64 |" in varied


def test_rows_measured_at_once_are_those_measured_in_turn(folder: Path, tmp_path: Path) -> None:
    found = {}
    for jobs in ("1", "2"):
        shown = call(
            folder, "--only", "^steps: (float|rounding|scale$)", "--jobs", jobs, "--output", str(tmp_path / jobs)
        )
        assert shown.exit_code == 0, shown.output
        found[jobs] = [
            {key: value for key, value in row.items() if key != "seconds"} for row in rows_of(tmp_path / jobs)
        ]
    assert found["1"] == found["2"] and len(found["1"]) == 3


def test_the_documentation_has_a_place_for_the_tables() -> None:
    before, _, rest = Path(__file__).parents[2].joinpath("docs", "accuracy.md").read_text().partition(BEGIN)
    assert before.startswith("# ") and END in rest


@pytest.mark.parametrize(
    "pattern", ["^calibration text: fast", "^off the grid: (float|fast)", r"^fp16 channels: .*0\.1 %"]
)
def test_the_other_sections_run(folder: Path, tmp_path: Path, pattern: str) -> None:
    shown = call(folder, "--only", pattern, "--output", str(tmp_path / "rows.csv"))
    assert shown.exit_code == 0, shown.output
    rows = rows_of(tmp_path / "rows.csv")
    assert len(rows) == {"c": 3, "o": 2, "f": 3}[pattern[1]]
    if "off the grid" in pattern:
        assert 0 < abs(float(rows[0]["prose_dln_x100"])) < 1e-3  # it is compared with the original
        assert abs(float(rows[0]["prose_kl_x1000"])) < 1e-3 < float(rows[1]["prose_kl_x1000"])
