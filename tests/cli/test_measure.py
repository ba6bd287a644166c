import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import awq.bench.kernels.overheads
import awq.bench.kernels.run
import awq.evaluate
import awq.pretrained.source
import awq.storage.load
from awq.bench.kernels.shapes import SWEEP, Setting, Shape
from awq.bench.results import Ceiling, KernelBench, row_of
from awq.bench.timing import Timing
from awq.errors import KernelNotSupportedError
from tests.cli.run import refused, run, run_json
from tests.tiny import tiny_llama

WINDOWS = ("--window", 64, "--max-windows", 3, "--device", "cpu")
SHORT = ("--prompt-tokens", 4, "--new-tokens", 3, "--repeats", 1, "--device", "cpu")


def test_perplexity(quantized: Path) -> None:
    found = run_json("eval", quantized, *WINDOWS)
    assert found["tokens"] == 3 * 63
    assert found["windows"] == 3
    assert 1 < found["perplexity"] < 1000
    assert found["outliers"]


def test_agreement_with_the_float_model(quantized: Path, tiny: Path) -> None:
    kept = run_json("eval", quantized, "--reference", tiny, *WINDOWS)
    alone = run_json("eval", quantized, "--reference", tiny, "--without-outliers", *WINDOWS)
    assert 0 < kept["kl_nats"] < alone["kl_nats"]
    assert kept["reference_perplexity"] == alone["reference_perplexity"]
    assert 0 < kept["top1_agreement"] <= 1
    change = 100 * (kept["perplexity"] / kept["reference_perplexity"] - 1)
    assert kept["perplexity_increase_percent"] == pytest.approx(change)


def test_perplexity_of_a_file(quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 100)
    found = run_json("eval", quantized, "--text", text, *WINDOWS)
    assert found["text"] == str(text)
    assert found["tokens"] == 63 + 35


def test_evaluation_as_a_table(quantized: Path) -> None:
    assert "perplexity" in run("eval", quantized, *WINDOWS).stdout


def test_latency_of_each_version_and_of_the_float_model(quantized: Path, tiny: Path) -> None:
    found = run_json("bench", "model", quantized, "--reference", tiny, *SHORT)
    assert [row["label"] for row in found["rows"]] == ["auto", "GEMM", "GEMV", "float (bfloat16)"]
    assert all(row["new_tokens"] == 3 and row["tokens_per_second"] > 0 for row in found["rows"])
    assert found["machine"]["device_type"] == "cpu"
    assert all(row["peak_bytes"] > row["weight_bytes"] for row in found["rows"])
    assert {row["peak_of"] for row in found["rows"]} == {"this process so far"}
    assert found["rows"][0]["weight_bytes"] < found["rows"][-1]["weight_bytes"]


def test_latency_as_a_table(quantized: Path) -> None:
    shown = run("bench", "model", quantized, "--version", "gemv", *SHORT)
    assert shown.exit_code == 0
    assert "GEMV" in shown.stdout
    assert "GEMM" not in shown.stdout
    assert "this process so far" in " ".join(shown.stdout.split())


def test_a_version_that_does_not_run_is_said(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = awq.storage.load.load_quantized

    def refuse(folder: str, *, version: str, **options: object) -> object:
        if version == "GEMM":
            raise KernelNotSupportedError("Kernel version not supported on this hardware: too old.")
        return load(folder, version=version, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(awq.storage.load, "load_quantized", refuse)
    found = run_json("bench", "model", quantized, *SHORT)
    assert [row["label"] for row in found["rows"]] == ["auto", "GEMV"]
    assert found["refused"].keys() == {"GEMM"}
    assert "too old" in run("bench", "model", quantized, *SHORT).stderr


@pytest.mark.parametrize(
    ("command", "loader"), [(("eval", *WINDOWS), "load_dequantized"), (("bench", "model", *SHORT), "load_quantized")]
)
def test_revision_and_trust_arrive(
    command: tuple[str, ...], loader: str, quantized: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    load, find = getattr(awq.storage.load, loader), awq.pretrained.source.find_source

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options)
        return load(*arguments, **options)

    def spy_source(model: str, **options: Any) -> Any:
        seen.append(options)
        return find(model, **options)

    monkeypatch.setattr(awq.storage.load, loader, spy)
    monkeypatch.setattr(awq.pretrained.source, "find_source", spy_source)
    run_json(*command, quantized, "--reference", tiny, "--revision", "v1", "--trust-remote-code")
    reference, *loads = seen
    assert reference == {"trust_remote_code": True}  # the revision is the checkpoint's
    assert loads
    assert all(options["revision"] == "v1" and options["trust_remote_code"] for options in loads)


def test_perplexity_of_a_named_column(quantized: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "' + "a" * 100 + '"}')
    assert run_json("eval", quantized, "--text", rows, "--text-column", "body", *WINDOWS)["tokens"] == 63 + 35


def test_another_versions_name_is_said(quantized: Path) -> None:
    with pytest.warns(UserWarning, match="'marlin' means GEMM"):
        found = run_json("bench", "model", quantized, "--version", "marlin", *SHORT)
    assert [row["label"] for row in found["rows"]] == ["GEMM"]


def test_kernels_as_json_csv_and_plot(tmp_path: Path) -> None:
    files = ("--csv", tmp_path / "rows.csv", "--plot", tmp_path / "rows.png")
    sizes = ("--shape", "64x128", "--rows", 1, "--rows", 9, "--seconds", 0.001, "--device", "cpu")
    found = run_json("bench", "kernels", *sizes, *files)
    assert {(row["version"], row["rows"]) for row in found["rows"]} >= {
        ("GEMV", 1),
        ("GEMV", 9),
        ("GEMM", 1),
        ("GEMM", 9),
    }
    assert found["crossovers"].keys() == {"64x128"}
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"])
    assert {"median_us", "device", "commit"} <= rows[0].keys()
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_kernels_as_a_table() -> None:
    shown = run("bench", "kernels", "--shape", "64x64", "--rows", 1, "--seconds", 0.001, "--device", "cpu")
    assert "median" in shown.stdout
    assert "64x64: GEMM is" in shown.stdout
    assert "% of ceiling" not in shown.stdout


def test_only_some_rows_and_one_version() -> None:
    sizes = ("--shape", "64x64", "--rows", "1,3-4", "--version", "gemv", "--seconds", 0.001, "--device", "cpu")
    found = run_json("bench", "kernels", *sizes)
    assert [(row["version"], row["rows"]) for row in found["rows"]] == [
        *(("GEMV", rows) for rows in (1, 3, 4)),
        *(("dense", rows) for rows in (1, 3, 4)),
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command asks to be timed; nothing is."""
    seen: list[dict[str, Any]] = []

    def bench(settings: list[Setting], device: object, **options: Any) -> KernelBench:
        seen.append({"settings": settings} | options)
        return cold_bench()

    monkeypatch.setattr(awq.bench.kernels.run, "bench_settings", bench)
    return seen


def cold_bench() -> KernelBench:
    setting, timing = Setting(Shape(64, 64), 64, torch.float16), Timing(1e-6, 1e-6, 1e-6, 9)
    rows = [
        row_of(setting, 1, version, kernel, Timing(us * 1e-6, 1e-6, 1e-6, 9), pdl=pdl, error=2e-4, dense_us=9.0)
        for version, kernel, us, pdl in (("GEMV", "awq_gemv", 3, True), ("GEMM", "awq_gemm", 4, True))
    ]
    dense = row_of(setting, 1, "dense", "cublas_fp16", timing)
    return KernelBench([dense, *rows], {}, Ceiling(1.0, 1.1), {"marlin": "it is not installed"}, ["something odd"])


def test_every_combination_of_settings(asked: list[dict[str, Any]]) -> None:
    flags = "--shape 64x128 --shape smollm2-135m --group-size 32 --group-size 64 --dtype fp16 --dtype bf16 --symmetric"
    run_json("bench", "kernels", *flags.split(), "--outlier-ratio", 0.01, "--device", "cpu", "--no-peers")
    (call,) = asked
    assert len(call["settings"]) == len(set(call["settings"])) == 5 * 2 * 2
    assert call["settings"][0] == Setting(Shape(64, 128), 32, torch.float16, False, 0.01)
    assert call["settings"][-1] == Setting(Shape(576, 1536), 64, torch.bfloat16, False, 0.01)
    assert call["peers"] == ()


def test_the_sweep_and_the_peers(asked: list[dict[str, Any]]) -> None:
    run_json("bench", "kernels", "--sweep", "--group-size", 128, "--rows", 1, "--device", "cpu", "--peer", "marlin")
    (call,) = asked
    assert tuple(setting.shape for setting in call["settings"]) == SWEEP
    assert [peer.name for peer in call["peers"]] == ["marlin"]
    assert call["rows"] == (1,)


@pytest.mark.usefixtures("asked")
def test_what_was_measured_cold_as_a_table() -> None:
    shown = run("bench", "kernels", "--device", "cpu")
    text = " ".join(shown.stdout.split())
    assert "% of ceiling" in text and "x dense" in text and "error" in text
    assert "Read ceiling: 1 GB/s before, 1 after" in text
    assert "64x64: GEMM is not faster at any number of rows; for one row GEMV takes 25 % less time." in text
    assert "Note: something odd." in text
    assert "marlin: it is not installed" in shown.stderr


@pytest.mark.usefixtures("asked")
def test_overheads_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"call": {"operator_us": 7.0}, "first_use": {"cold": {"first_s": 3.0}}}
    monkeypatch.setattr(awq.bench.kernels.overheads, "measure_overheads", lambda device: figures)
    assert run_json("bench", "kernels", "--overheads", "--device", "cpu")["overheads"] == figures
    text = " ".join(run("bench", "kernels", "--overheads", "--device", "cpu").stdout.split())
    assert "operator us 7.00" in text and "cold first s 3.00" in text


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--shape llama-9", "llama-2-7b"),
        ("--rows 0", "rows '0'"),
        ("--rows 4-2", "rows '4-2'"),
        ("--rows 1,x", "rows 'x'"),
        ("--version turbo", "'turbo'"),
        ("--version auto", "'auto'"),
        ("--dtype fp8", "'fp8'"),
        ("--group-size 0", "group size 0"),
        ("--outlier-ratio 0.5", "0.5"),
        ("--peer triton", "'triton'"),
        ("--csv absent/rows.csv", "absent does not exist"),
        ("--overheads", "CUDA"),
    ],
)
def test_wrong_settings_of_the_kernel_benchmark(flags: str, part: str) -> None:
    assert part in refused("bench", "kernels", "--device", "cpu", *flags.split())


def test_tasks_of_the_model_and_of_its_reference(quantized: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate_tasks(model: Any, _tokenizer: Any, tasks: list[str], limit: int | None) -> dict[str, dict[str, float]]:
        asked.append((tasks, limit))
        return {task: {"acc": 0.1 * len(asked)} for task in tasks}

    monkeypatch.setattr(awq.evaluate, "evaluate_tasks", evaluate_tasks)
    monkeypatch.setattr(awq.evaluate, "check_tasks", lambda tasks: None)
    flags = ("--tasks", "hellaswag, arc_easy", "--limit", 5, "--reference", tiny, *WINDOWS)
    found = run_json("eval", quantized, *flags)
    assert asked == [(["hellaswag", "arc_easy"], 5)] * 2
    assert found["tasks"]["arc_easy"]["acc"] == pytest.approx(0.1)
    assert found["reference_tasks"]["arc_easy"]["acc"] == pytest.approx(0.2)
    shown = " ".join(run("eval", quantized, *flags).stdout.split())
    assert "hellaswag acc 0.3" in shown and "reference hellaswag acc 0.4" in shown


def test_tasks_without_their_package(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert 'pip install "awq-int4[eval]"' in refused("eval", quantized, "--tasks", "hellaswag", *WINDOWS)


def test_a_shape_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.bench.models.config_of", lambda name: tiny_llama().config)
    file = tmp_path / "rows.csv"
    flags = ("--batch", 1, "--batch", 3, "--version", "GEMV", "--tier", 1, "--outlier-ratio", 0.02, "--csv", file)
    found = run_json("bench", "model", "llama-3-8b", *flags, *SHORT)
    assert [(row["label"], row["batch"], row["tier"]) for row in found["rows"]] == [("GEMV", 1, 1), ("GEMV", 3, 1)]
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["model"] for row in rows] == ["llama-3-8b 2 % outliers"] * 2


def test_an_int8_head_and_what_it_costs(quantized: Path) -> None:
    shown = run("bench", "model", quantized, "--head", "int8", "--version", "GEMV", *SHORT)
    assert shown.exit_code == 0
    assert "head=int8: perplexity " in shown.stderr
    assert "tier 2: fused step of torch operations" in shown.stderr
    assert "no folder" not in refused("bench", "model", quantized, "--head", "int3", *SHORT)
    assert "random weights" in refused("bench", "model", quantized, "--outlier-ratio", 0.01, *SHORT)


def test_memory_that_runs_out_ends_the_larger_batches(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import awq.bench.generation
    from awq.errors import OutOfMemoryError

    measure = awq.bench.generation.measure_generation

    def limited(model: Any, label: str, *, batch: int, **settings: Any) -> Any:
        if batch > 2:
            raise OutOfMemoryError("the cache is too large.")
        return measure(model, label, batch=batch, **settings)

    monkeypatch.setattr(awq.bench.generation, "measure_generation", limited)
    batches = [word for batch in (1, 2, 4, 8) for word in ("--batch", batch)]
    found = run_json("bench", "model", quantized, "--version", "auto", *batches, *SHORT)
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    assert found["refused"] == {"auto, batch 4": "the cache is too large."}
