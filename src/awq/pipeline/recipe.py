"""The whole recipe: float model + calibration text -> quantized model -> checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from awq import __version__
from awq.algorithm.blocks import quantize_blocks
from awq.algorithm.ranks import here
from awq.checkpoint.output import check_output, finished_recipe, output_path, unfinished
from awq.checkpoint.read import open_checkpoint
from awq.checkpoint.shards import parse_size
from awq.checkpoint.write import check_settings
from awq.config import QuantConfig
from awq.data.calibration import CalibrationSet, load_calibration
from awq.errors import CalibrationError, ConfigError
from awq.linear import QuantLinear
from awq.pipeline.effort import inner_loops, warn_if_slow
from awq.pipeline.job import open_job, run_job, warn_fallbacks
from awq.pipeline.memory import Limits
from awq.pipeline.run import Target
from awq.pipeline.stages import Stages
from awq.pretrained.source import check_finite, find_source, pick_device, replace_module, skeleton, undispatched
from awq.processes import agree, in_company
from awq.progress import track
from awq.storage.save import extras_of
from awq.structure.experts import split_experts
from awq.structure.linears import as_linear
from awq.structure.plan import Plan, make_plan

__all__ = ["Finished", "check_length", "check_model", "quantize_folder", "quantize_model"]


@dataclass(frozen=True)
class Finished:
    """A checkpoint on disk.

    already_complete: the identical recipe had been run before, so nothing was
    seconds:          by stage of this run; memory: the most that it took, in bytes, by place
    """

    path: Path
    report: dict[str, Any]
    warnings: tuple[str, ...] = ()
    size_bytes: int = 0
    already_complete: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)


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
    loops = inner_loops(place, planned.config)
    recipe = {"config": _config_dict(planned.config), "calibration": _calibration_dict(calibration)}
    agree("the recipe", recipe)
    solve = quantize_blocks(model, calibration.tokens, planned.config, wanted.__contains__, place, loops)
    shown = progress and here().rank == 0
    with track("Quantizing", blocks, enabled=shown) as bar, undispatched(model, planned.blocks):
        for block, results in solve:
            for linear, result in results.items():
                replace_module(model, linear, QuantLinear(result.packed, result.bias, result.outliers))
                linears[linear] = result.report
            warn_fallbacks(block, {linear: result.report for linear, result in results.items()})
            bar.advance(note=block)
    return _report(recipe, planned) | {"linears": linears}


def _report(recipe: dict[str, Any], planned: Plan) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "versions": {"awq": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "linears": {},
        "not_converted": planned.not_converted,
        "notes": [*planned.notes],
    }


def check_model(model: Any, config: QuantConfig, name: str) -> Plan:
    """The plan for a model whose weights are there; ConfigError or CheckpointError where they cannot be quantized."""
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ConfigError(f"{name} is quantized already, at least in part: load its float original again.")
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ConfigError(f"{name} is on the disk in part: quantize its folder instead, which is read block by block.")
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
    shard_size: str | int = "5GB",
    whole: bool = False,
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
    progress: bool = True,
) -> Finished:
    """Quantize the model at `model` (folder, GGUF or hub id) into the folder `output`, block by block.

    The float model stays on disk but for a block or two; `whole` loads all of it at once, as a GGUF needs. Everything
    that can be wrong with the arguments is found before the weights are read. A run that was ended goes on behind its
    last finished block when it is started again, and an output finished by the identical recipe is left alone.

    gpu_memory, host_memory: what may be used of a GPU and of a machine, in bytes or as "8GiB"; most of what is free by
        default
    """
    target = Target(output_path(output), parse_size(shard_size), overwrite, verify)
    limits = Limits(*(None if size is None else parse_size(size) for size in (gpu_memory, host_memory)))
    check_settings(replace(config, group_size=config.group_size or -1), verify)
    place = pick_device(device)
    source = find_source(model, revision=revision, trust_remote_code=trust_remote_code)
    done = here().tell(finished_recipe(target.path))[0]
    if done is None and here().rank == 0:
        check_output(target.path, overwrite)
    model_config = source.config()
    check_length(model_config, seq_len, source.name)
    outline = skeleton(model_config, trust_remote_code=trust_remote_code)
    split_experts(outline)
    make_plan(outline, config)
    tokenizer = source.tokenizer()
    job = open_job(source, config, place, whole="it writes its own text" if "self" in calibration else whole)
    text = load_calibration(
        tokenizer,
        sources=list(calibration) or None,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        text_column=text_column,
        model=job.model if "self" in calibration else None,
    )
    recipe = {
        "awq": __version__,
        "model": {"name": Path(source.name).name, "fingerprint": source.fingerprint()},
        "config": _config_dict(job.planned.config),
        "calibration": _calibration_dict(text),
    }
    agree("the recipe", recipe)
    if done == recipe and not overwrite:
        return _already_complete(target.path)
    _check_tokens(job.outline, text.tokens, source.name)
    extras = extras_of(job.model, [tokenizer], source.processor_files())
    report = _report(recipe, job.planned) | {"source": source.origin()}
    with Stages(place) as stages:
        written = run_job(job, target, text.tokens, report, extras, stages=stages, limits=limits, progress=progress)
    return Finished(written.path, report, written.warnings, written.bytes, False, stages.seconds, stages.memory())


def _already_complete(output: Path) -> Finished:
    """As rank 0 finds it: to other machines the folder is unknown."""
    found: tuple[dict[str, Any], int] = ({}, 0)
    if here().rank == 0:
        open_checkpoint(output)  # a file may have gone since
        shutil.rmtree(unfinished(output), ignore_errors=True)
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
