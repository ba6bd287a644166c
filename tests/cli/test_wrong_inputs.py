"""Each wrong input of a user ends in one sentence before any long work, with exit code 2."""

import shutil
from pathlib import Path

import pytest
import torch

from awq.pipeline import recipe
from tests.cli.run import refused, run
from tests.tiny import save_tiny, tiny_llama


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--bits 8", "bits=8"),
        ("--bits 3", "cannot be stored"),
        ("--group-size 100", "group_size=100"),
        ("--group-size 128", "use 64, 32"),
        ("--outlier-ratio 0.5", "outlier_ratio=0.5"),
        ("--outlier-ratio -0.1", "outlier_ratio=-0.1"),
        ("--version turbo", "'turbo'"),
        ("--device tpu", "'tpu'"),
        ("--samples 0", "0 samples"),
        ("--calibration absent.txt", "absent.txt does not exist"),
        ("--calibration nosuchset", "nosuchset does not exist"),
        ("--modules-to-not-convert layers", "nothing is left to quantize"),
    ],
)
def test_settings(tiny: Path, out: Path, flags: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "quantize_blocks", None)  # no long work
    assert part in refused("quantize", tiny, "--output", out, *flags.split())
    assert not out.exists()


def test_cuda_where_there_is_none(tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "'cuda'" in refused("quantize", tiny, "--output", out, "--device", "cuda")


@pytest.mark.parametrize("name", ["absent", "./absent", "absent/too/deep"])
def test_missing_model(name: str, out: Path) -> None:
    assert f"{name} does not exist" in refused("quantize", name, "--output", out)


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt x", "eval {}", "bench model {}"])
def test_missing_checkpoint(command: str) -> None:
    assert "absent does not exist" in refused(*command.format("absent").split())


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt x", "eval {}", "bench model {}"])
def test_float_model_where_a_checkpoint_is_needed(tiny: Path, command: str) -> None:
    assert "is not quantized" in refused(*command.format(tiny).split())


@pytest.mark.parametrize("command", ["quantize {} --output out", "inspect {}", "generate {} --prompt x", "eval {}"])
def test_empty_model(command: str) -> None:
    assert "'' names no model" in refused(*(word.format("") for word in command.split()))


@pytest.mark.parametrize("command", ["quantize {}", "demo"])
def test_empty_output(tiny: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq.cli.demo.find_embedded_model", lambda: tiny)
    assert "'' names no output folder" in refused(*command.format(tiny).split(), "--output", "")


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt x", "eval {}", "bench model {}"])
def test_a_file_where_a_folder_is_meant(quantized: Path, command: str) -> None:
    sentence = refused(*command.format(quantized / "model.safetensors").split())
    assert "model.safetensors is a file: give the folder that it lies in" in sentence


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt x", "chat {}", "bench model {}"])
def test_a_gguf_file_where_a_quantized_folder_is_meant(tmp_path: Path, command: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "quantize it first" in refused(*command.format(tmp_path / "model.gguf").split())


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt x", "chat {}", "eval {}", "bench model {}"])
def test_a_folder_of_something_else(tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.md").write_text("no model")
    assert "no config.json" in refused(*command.format(tmp_path).split())


def test_a_shape_that_nobody_knows() -> None:
    assert "llama-9-9b does not exist, and is no known shape (llama-2-7b, " in refused("bench", "model", "llama-9-9b")


def test_text_that_is_no_text(quantized: Path) -> None:
    assert "--prompt is no UTF-8 from character 3 on" in refused("generate", quantized, "--prompt", "caf\udcff")
    assert "--stop is no UTF-8" in refused("generate", quantized, "--prompt", "x", "--stop", "\udcff")
    assert "--stop is empty" in refused("generate", quantized, "--prompt", "x", "--stop", "")
    assert "--system is no UTF-8" in refused("chat", quantized, "--system", "\udcff")


def test_pickles_only(tiny: Path, tmp_path: Path, out: Path) -> None:
    model = tmp_path / "pickled"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickled" in refused("quantize", model, "--output", out)


def test_quantized_twice(quantized: Path, out: Path) -> None:
    assert "already quantized" in refused("quantize", quantized, "--output", out)


def test_empty_calibration_file(tiny: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    assert "holds no text" in refused("quantize", tiny, "--output", out, "--calibration", tmp_path / "empty.txt")


def test_short_calibration_file(tiny: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    assert "short.txt" in refused("quantize", tiny, "--output", out, "--calibration", tmp_path / "short.txt")


def test_calibration_rows_without_the_text_column(tiny: Path, tmp_path: Path, out: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"no": 1}')
    assert "its columns are 'no'" in refused("quantize", tiny, "--output", out, "--calibration", rows)
    flags = ("--calibration", rows, "--text-column", "no")
    assert "holds a int where text is needed" in refused("quantize", tiny, "--output", out, *flags)


def test_output_that_holds_something(tiny: Path, out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "--overwrite" in refused("quantize", tiny, "--output", out)
    assert (out / "thesis.txt").exists()


@pytest.mark.parametrize("command", ["inspect {}", "generate {} --prompt x", "eval {}"])
def test_truncated_checkpoint(quantized: Path, tmp_path: Path, command: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(quantized, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "model.safetensors is truncated" in refused(*command.format(broken).split())


def test_nan_in_the_weights_names_the_tensor(tmp_path: Path, out: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    folder = save_tiny(tmp_path / "nan", model)
    result = run("quantize", folder, "--output", out, "--samples", 2, "--seq-len", 64, "--group-size", 32)
    assert result.exit_code == 2 and not result.stdout
    *_, sentence = result.stderr.splitlines()
    assert sentence.startswith("error: ")
    assert "model.layers.1.mlp.up_proj.weight" in sentence


def test_checkpoint_without_a_tokenizer(quantized: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(quantized, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "has no readable tokenizer" in refused("generate", bare, "--prompt", "x")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("generate {} --prompt x --version turbo", "'turbo'"),
        ("generate {} --prompt x --kernel warp", "'warp'"),
        ("generate {} --prompt x --top-p 2", "top_p=2.0"),
        ("generate {} --prompt x --repetition-penalty nan", "repetition_penalty=nan"),
        ("generate {} --prompt x --repetition-penalty 0", "repetition_penalty=0.0"),
        ("generate {} --prompt x --temperature inf", "temperature=inf"),
        ("generate {} --prompt x --seed 99999999999999999999999", "'--seed'"),
        ("bench model {} --seed -1", "'--seed'"),
        ("generate {} --prompt x --device cuda:99", "cuda:99"),
        ("eval {} --limit 5", "--limit is for the tasks"),
        ("eval {} --text absent.txt", "absent.txt does not exist"),
        ("eval {} --reference absent", "absent does not exist"),
        ("eval {} --device abacus", "abacus"),
        ("bench model {} --version turbo", "'turbo'"),
        ("bench model {} --reference absent", "absent does not exist"),
    ],
)
def test_settings_of_what_reads_a_checkpoint(quantized: Path, command: str, part: str) -> None:
    assert part in refused(*command.format(quantized).split())


def test_prompt_without_a_token(quantized: Path) -> None:
    assert "prompt holds no token" in refused("generate", quantized, "--prompt", "")


@pytest.mark.parametrize(
    ("flags", "part"),
    [("--shape 64", "'64'"), ("--shape 12x64", "multiple of 8"), ("--shape 64x100", "group size 64 does not divide")],
)
def test_settings_of_the_kernel_benchmark(flags: str, part: str) -> None:
    assert part in refused("bench", "kernels", *flags.split())


@pytest.mark.parametrize("command", ["inspect {}", "bench kernels"])
@pytest.mark.parametrize(
    ("plot", "part"),
    [("plot.xyz", "end in .png, .svg or .pdf"), ("plot", "end in"), ("absent/plot.png", "absent does not exist")],
)
def test_plots_that_cannot_be_drawn(
    quantized: Path, tmp_path: Path, command: str, plot: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awq.bench.kernels.run.bench_settings", None)  # no long work
    assert part in refused(*command.format(quantized).split(), "--plot", tmp_path / plot)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["bench model {}", "bench kernels"])
def test_rows_that_cannot_be_written(
    quantized: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awq.bench.kernels.run.bench_settings", None)  # no long work
    monkeypatch.setattr("awq.bench.generation.measure_generation", None)
    (tmp_path / "file").write_text("")
    assert "file does not exist" in refused(*command.format(quantized).split(), "--csv", tmp_path / "file" / "x.csv")
    long = tmp_path / f"{'x' * 300}.csv"
    assert "File name too long" in refused(*command.format(quantized).split(), "--csv", long)
