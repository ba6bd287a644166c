"""The whole recipe: float model + calibration text -> quantized model -> checkpoint."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from awq import __version__
from awq.algorithm.blocks import quantize_blocks
from awq.algorithm.ranks import here
from awq.calibration import CalibrationSet, load_calibration
from awq.checkpoint.output import check_output, finished_recipe
from awq.checkpoint.read import open_checkpoint
from awq.config import QuantConfig
from awq.effort import column_loop, warn_if_slow
from awq.errors import CalibrationError, ConfigError
from awq.experts import split_experts
from awq.linear import QuantLinear
from awq.linears import as_linear
from awq.plan import Plan, make_plan
from awq.processes import agree, in_company
from awq.progress import track
from awq.save import save_quantized
from awq.source import check_finite, find_source, pick_device, replace_module, skeleton

__all__ = ["Finished", "check_length", "check_model", "quantize_folder", "quantize_model", "save_quantized"]


@dataclass(frozen=True)
class Finished:
    """A checkpoint on disk. `already_complete`: the identical recipe had been run before, so nothing was."""

    path: Path
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()
    size_bytes: int = 0
    already_complete: bool = False


@in_company
def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    calibration: CalibrationSet,
    *,
    device: str | torch.device = "auto",
    name: str = "the model",
    progress: bool = True,
) -> dict[str, Any]:
    """Quantize `model` in place, its linears replaced by QuantLinear; returns the report that is saved beside it.

    Errors: ConfigError, CheckpointError (NaN weights) and UnsupportedModelError, all before any long work.
    """
    planned = check_model(model, config, name)
    _check_tokens(model, calibration.tokens, name)
    for note in planned.notes:
        warnings.warn(note, stacklevel=2)
    linears: dict[str, Any] = {}
    wanted = frozenset(planned.linears)
    for linear in wanted:
        replace_module(model, linear, as_linear(model.get_submodule(linear)))
    blocks = len(model.get_submodule(planned.blocks))  # type: ignore[arg-type]
    place = pick_device(device)
    warn_if_slow(model, wanted, planned.config, place)
    recipe = {"config": _config_dict(planned.config), "calibration": _calibration_dict(calibration)}
    agree("the recipe", recipe)
    solve = quantize_blocks(model, calibration.tokens, planned.config, wanted.__contains__, place, column_loop(place))
    with track("Quantizing", blocks, enabled=progress and here().rank == 0) as bar:
        for block, results in solve:
            for linear, result in results.items():
                replace_module(model, linear, QuantLinear(result.packed, result.bias, result.outliers))
                linears[linear] = result.report
            _warn_fallbacks(block, {linear: result.report for linear, result in results.items()})
            bar.advance(note=block)
    return {
        "recipe": recipe,
        "versions": {"awq": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "linears": linears,
        "not_converted": planned.not_converted,
        "notes": [*planned.notes],
    }


def check_model(model: Any, config: QuantConfig, name: str) -> Plan:
    """The plan for a model whose weights are there; ConfigError or CheckpointError where they cannot be quantized."""
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError(f"{name} is quantized already, at least in part: load its float original again.")
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise ConfigError(
            f"{name} is spread over {', '.join(sorted(places))}: load it on one device; blocks visit the GPU in turn."
        )
    split_experts(model)
    planned = make_plan(model, config)
    check_finite(model, name)
    return planned


def check_length(config: Any, seq_len: int, name: str) -> None:
    """CalibrationError where the model takes no blocks of `seq_len` tokens."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and seq_len > longest:
        raise CalibrationError(f"blocks of {seq_len} tokens are longer than the {longest} that {name} takes.")


def _check_tokens(model: Any, tokens: Tensor, name: str) -> None:
    check_length(model.config, tokens.shape[1], name)
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"the calibration text has token {int(tokens.max())}, {name} only {vocabulary}: "
            "pass the tokenizer that belongs to the model."
        )


def _warn_fallbacks(block: str, reports: dict[str, dict[str, Any]]) -> None:
    for reason in {report["fallback"] for report in reports.values()} - {None}:
        names = ", ".join(name for name, report in reports.items() if report["fallback"] == reason)
        warnings.warn(f"{block}: {reason} in {names}: rounded plainly.", stacklevel=3)


@in_company
def quantize_folder(
    model: str | Path,
    output: str | Path,
    config: QuantConfig,
    *,
    calibration: Sequence[str | Path] = (),
    samples: int = 128,
    seq_len: int = 512,
    seed: int = 0,
    text_column: str = "text",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    verify: str = "quick",
    progress: bool = True,
) -> Finished:
    """Quantize the model at `model` (folder, GGUF or hub id) into the folder `output`.

    Everything that can be wrong with the arguments is found before the weights are read. An output finished by the
    identical recipe is reported complete and left alone.
    """
    if config.bits != 4:
        raise ConfigError(f"bits={config.bits} cannot be stored: the checkpoint format holds 4-bit codes only.")
    pick_device(device)
    source = find_source(model, revision=revision, trust_remote_code=trust_remote_code)
    done = here().tell(finished_recipe(Path(output)))[0]
    if done is None and here().rank == 0:
        check_output(Path(output), overwrite)
    model_config = source.config()
    check_length(model_config, seq_len, source.name)
    outline = skeleton(model_config, trust_remote_code=trust_remote_code)
    split_experts(outline)
    planned = make_plan(outline, config)
    tokenizer = source.tokenizer()
    float_model = source.load() if "self" in calibration else None
    if float_model is not None:
        check_finite(float_model, source.name)
    text = load_calibration(
        tokenizer,
        sources=list(calibration) or None,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        text_column=text_column,
        model=float_model,
    )
    recipe = {
        "awq": __version__,
        "model": {"name": Path(source.name).name, "fingerprint": source.fingerprint()},
        "config": _config_dict(planned.config),
        "calibration": _calibration_dict(text),
    }
    agree("the recipe", recipe)
    if done == recipe and not overwrite:
        return _already_complete(Path(output))
    if here().rank == 0:
        check_output(Path(output), overwrite)
    float_model = float_model or source.load()
    report = quantize_model(float_model, config, text, device=device, name=source.name, progress=progress)
    report["recipe"] = recipe
    written = save_quantized(
        float_model,
        output,
        report,
        tokenizer=tokenizer,
        beside=source.processor_files(),
        overwrite=overwrite,
        verify=verify,
    )
    return Finished(written.path, report, written.warnings, written.bytes)


def _already_complete(output: Path) -> Finished:
    """As rank 0 finds it: to other machines the folder is unknown."""
    found: tuple[dict[str, Any], int] = ({}, 0)
    if here().rank == 0:
        open_checkpoint(output)  # a file may have gone since
        report = json.loads((output / "awq_report.json").read_text(encoding="utf-8"))
        found = report, sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    report, size = here().tell(found)[0]
    return Finished(output, report, size_bytes=size, already_complete=True)


def _config_dict(config: QuantConfig) -> dict[str, Any]:
    return {**asdict(config), "modules_to_not_convert": list(config.modules_to_not_convert)}


def _calibration_dict(calibration: CalibrationSet) -> dict[str, Any]:
    tokens = calibration.tokens
    return {
        "sources": list(calibration.description),
        "shape": list(tokens.shape),
        "tokens_sha256": hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).hexdigest(),
    }
