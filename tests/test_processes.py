"""Several processes write, bit by bit, what one does; and end together."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from awq import AutoAWQForCausalLM
from awq.algorithm import blocks, learn
from awq.checkpoint.journal import JOURNAL_FILE
from awq.checkpoint.output import unfinished
from awq.checkpoint.read import open_checkpoint
from awq.cli.app import app
from awq.config import QuantConfig
from awq.errors import AwqError, CheckpointError, ConfigError, EndedElsewhereError
from awq.pipeline.recipe import quantize_folder
from tests.several import run
from tests.tiny import VOCABULARY, byte_tokenizer, save_tiny

CONFIG = QuantConfig(group_size=32, outlier_ratio=0.03)
TEXT: dict[str, Any] = {"calibration": ["prose"], "seq_len": 32, "device": "cpu", "progress": False}
# (model, effort, sequences): ten chunks of text, or fewer than there are processes
CASES = [("dense", "fast", 40), ("dense", "balanced", 40), ("experts", "balanced", 40), ("dense", "balanced", 2)]
Case = tuple[str, str, int]
GO_ON = "the same command goes on behind them."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def save_models(folder: Path) -> Path:
    save_tiny(folder / "dense")
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**settings, num_hidden_layers=2, num_local_experts=3, vocab_size=VOCABULARY)
    MixtralForCausalLM(config).to(torch.float16).save_pretrained(folder / "experts")
    byte_tokenizer().save_pretrained(folder / "experts")
    return folder


def quantize_all(models: Path, output: Path, cases: list[Case], device: str = "cpu") -> list[str]:
    """A checkpoint of each case in `output`; returns what was warned of."""
    learn.STEPS = 12
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for model, effort, samples in cases:
            config = QuantConfig(group_size=32, outlier_ratio=0.03, effort=effort)
            folder = output / f"{model}-{effort}-{samples}"
            quantize_folder(models / model, folder, config, samples=samples, **TEXT | {"device": device})
    return [str(one.message) for one in said]


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert_done(run(1, quantize_all, models, folder, CASES))
    return folder


def assert_done(results: list[Any]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise result


@pytest.mark.parametrize(("size", "cases"), [(2, CASES[:3]), (3, CASES[2:]), (4, CASES)])
def test_the_checkpoint_does_not_depend_on_the_number_of_processes(
    models: Path, alone: Path, tmp_path: Path, size: int, cases: list[Case]
) -> None:
    results = run(size, quantize_all, models, tmp_path, cases)
    assert_done(results)
    assert len(list(tmp_path.iterdir())) == len(cases)
    for checkpoint in tmp_path.iterdir():
        assert digests(checkpoint) == digests(alone / checkpoint.name)
    assert not any(results[1:])  # the first warns for all


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "experts"])
def test_what_is_learned_does_not_depend_on_the_number_of_processes(models: Path, tmp_path: Path, model: str) -> None:
    for size in (1, 2, 4):
        assert_done(run(size, quantize_all, models, tmp_path / str(size), [(model, "max", 40)], seconds=600))
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(tmp_path / "4")


def users_script(model: Path, output: Path) -> list[float]:
    warnings.simplefilter("ignore")
    awq_model = AutoAWQForCausalLM.from_pretrained(model)
    awq_model.quantize(
        byte_tokenizer(), {"w_bit": 4, "q_group_size": 32}, "prose", max_calib_samples=8, max_calib_seq_len=32
    )
    awq_model.save_quantized(output)
    loaded = AutoAWQForCausalLM.from_quantized(output, device_map="cpu")
    with torch.inference_mode():
        logits: list[float] = loaded(torch.arange(8)[None]).logits.flatten().tolist()
    return logits


def test_a_users_script_has_the_model_in_every_process(models: Path, tmp_path: Path) -> None:
    logits = {size: run(size, users_script, models / "dense", tmp_path / str(size)) for size in (1, 2)}
    assert_done([*logits[1], *logits[2]])
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert logits[2] == logits[1] * 2


def fail_in_a_block(models: Path, output: Path) -> None:
    if os.environ["RANK"] == "1":
        finish = blocks.finish

        def damaged(*args: Any) -> Any:
            damaged.count += 1  # type: ignore[attr-defined]
            if damaged.count > 4:  # type: ignore[attr-defined]
                raise CheckpointError("this disk is damaged.")
            return finish(*args)

        damaged.count = 0  # type: ignore[attr-defined]
        blocks.finish = damaged
    quantize_folder(models / "dense", output, CONFIG, samples=8, **TEXT)


def test_an_error_in_one_process_ends_all(models: Path, tmp_path: Path) -> None:
    first, second = run(2, fail_in_a_block, models, tmp_path / "awq", seconds=60)
    assert isinstance(first, EndedElsewhereError)
    assert isinstance(second, CheckpointError)
    assert str(second) == f"this disk is damaged. 1 of 2 blocks are kept: {GO_ON}"
    assert not (tmp_path / "awq").exists()


def solve_and_end(models: Path, output: Path, endings: dict[str, str], effort: str = "balanced") -> list[int]:
    """The blocks that were solved; `endings` says by rank how a process ends while it solves the second."""
    solved: list[int] = []
    solve, ending = blocks.BlockLoop._solve, endings.get(os.environ.get("RANK", "0"))

    def ended(self: Any, block: Any, index: int, stored_in: Any) -> Any:
        if index == 1 and ending == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 1 and ending == "interrupted":
            raise KeyboardInterrupt
        solved.append(index)
        return solve(self, block, index, stored_in)

    blocks.BlockLoop._solve = ended  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*the same bits")
        config = QuantConfig(group_size=32, outlier_ratio=0.03, effort=effort)
        quantize_folder(models / "dense", output, config, samples=40, **TEXT)
    return solved


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 4), (0, 3)])
def test_after_a_kill_any_number_goes_on(models: Path, alone: Path, tmp_path: Path, rank: int, size: int) -> None:
    ended = run(2, solve_and_end, models, tmp_path / "awq", {str(rank): "killed"})
    assert ended[rank] is None and isinstance(ended[1 - rank], AwqError)
    journal = unfinished(tmp_path / "awq") / JOURNAL_FILE
    done = len(journal.read_text().splitlines()) - 1 if journal.exists() else 0
    assert done or not rank  # the first may have been killed while it wrote
    results = run(size, solve_and_end, models, tmp_path / "awq", {})
    assert_done(results)
    assert results == [[*range(done, 2)]] * size
    assert digests(tmp_path / "awq") == digests(alone / "dense-balanced-40")
    assert [path.name for path in tmp_path.iterdir()] == ["awq"]


def test_an_interrupt_of_all_is_said_by_the_first(models: Path, tmp_path: Path) -> None:
    both = {"0": "interrupted", "1": "interrupted"}
    first, second = run(2, solve_and_end, models, tmp_path / "awq", both, "fast")
    assert isinstance(second, KeyboardInterrupt | EndedElsewhereError)
    assert isinstance(first, KeyboardInterrupt) and str(first) == f"1 of 2 blocks are kept: {GO_ON}"
    assert_done(run(3, solve_and_end, models, tmp_path / "awq", {}, "fast"))


def with_own_seed(models: Path, output: Path) -> None:
    quantize_folder(models / "dense", output, CONFIG, samples=8, seed=int(os.environ["RANK"]), **TEXT)


def test_processes_that_were_told_different_things_do_not_start(models: Path, tmp_path: Path) -> None:
    results = run(2, with_own_seed, models, tmp_path / "awq", seconds=60)
    assert sorted(type(result).__name__ for result in results) == ["ConfigError", "EndedElsewhereError"]
    (error,) = (result for result in results if type(result) is ConfigError)
    assert str(error).startswith("the recipe of process 1 is not that of process 0 (calibration)")


def command_line(*arguments: str) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of an `awq` command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app(list(arguments), prog_name="awq")
        except SystemExit as exit_:
            return exit_.code, out.getvalue(), err.getvalue()
    return None, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [(["--bits", "3"], "bits=3 cannot be stored"), (["--seq-len", "2048"], "longer than the 1024"), ([], "not empty")],
)
def test_what_is_wrong_is_said_once(models: Path, tmp_path: Path, wrong: list[str], sentence: str) -> None:
    output = tmp_path / "awq" if wrong else models
    done = run(2, command_line, "quantize", str(models / "dense"), "-o", str(output), "--device", "cpu", *wrong)
    assert [code for code, _, _ in done] == [2, 2]
    said = "".join(err for _, _, err in done)
    assert said.count("error: ") == 1 and sentence in said


def test_torchrun_writes_and_prints_once(models: Path, tmp_path: Path) -> None:
    text = ["--calibration", "prose", "--samples", "4", "--seq-len", "32", "--device", "cpu", "--effort", "fast"]
    command = ["quantize", str(models / "dense"), "-o", str(tmp_path / "awq"), "--group-size", "32", *text]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "awq", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Quantized") == 1
    assert done.stderr.count("Quantizing: 2/2") == 1
    assert open_checkpoint(tmp_path / "awq")
