"""A model to quantize into a folder: where its weights are, what becomes of it, and the loop that gets it there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awq.algorithm.blocks import BlockLoop
from awq.algorithm.inputs.activations import Activations
from awq.algorithm.ranks import here
from awq.algorithm.result import Results
from awq.checkpoint.output import unfinished
from awq.checkpoint.write import Written
from awq.config import QuantConfig
from awq.errors import AwqError, OutOfMemoryError
from awq.pipeline.effort import inner_loops, warn_if_slow
from awq.pipeline.elsewhere import Elsewhere, open_run
from awq.pipeline.memory import Limits, Place, plan_activations
from awq.pipeline.run import Run, Solved, Target, in_background
from awq.pipeline.stages import Stages
from awq.pretrained.source import Source, check_finite, replace_module
from awq.pretrained.weights import DiskWeights, LoadedWeights, obstacle, open_outline
from awq.processes import on_this_machine
from awq.progress import track
from awq.storage.names import by_stored_names
from awq.storage.save import by_the_first, model_config
from awq.storage.stored import Stored
from awq.structure.blocks import find_blocks
from awq.structure.experts import split_experts
from awq.structure.linears import as_linear
from awq.structure.plan import Plan, make_plan


@dataclass(frozen=True)
class Job:
    """model: as transformers has it, on the meta device where it is read block by block; outline: as quantized"""

    model: Any
    outline: Any
    planned: Plan
    device: torch.device
    weights: DiskWeights | LoadedWeights


def open_job(source: Source, config: QuantConfig, device: torch.device, whole: bool | str = False) -> Job:
    """The model, streamed from its files where that can be done; all of it is loaded for `whole`, or its reason."""
    model = None if whole or source.gguf else open_outline(source)
    reason = whole if model is None else obstacle(source, model, find_blocks(model)[0])
    if reason or model is None:
        model = source.load()
        check_finite(model, source.name)
        if isinstance(reason, str):
            warnings.warn(f"{source.name} is loaded whole: {reason}.", stacklevel=3)
    outline = deepcopy(model) if next(model.parameters()).is_meta else model
    split_experts(outline)
    planned = make_plan(outline, config)
    prepare = _preparation(model, planned)
    if outline is model:
        prepare(planned.blocks)
        return Job(model, outline, planned, device, LoadedWeights(model, planned.blocks))
    return Job(model, outline, planned, device, DiskWeights(source, model, planned.blocks, device, prepare))


def run_job(
    job: Job,
    target: Target,
    tokens: Tensor,
    report: dict[str, Any],
    extras: Callable[[Path], None],
    *,
    stages: Stages,
    limits: Limits | None = None,
    progress: bool = True,
) -> Written:
    """Solve every block that an earlier run has not, and write the checkpoint; `report` gets the linears.

    Several processes do so together: each reads the blocks for itself, the first writes.
    AwqError, or a KeyboardInterrupt that says what is kept, where it ends before.
    """
    for note in job.planned.notes:
        warnings.warn(note, stacklevel=3)
    warn_if_slow(job.outline, job.planned.linears, job.planned.config, job.device)
    identity = {"recipe": report["recipe"], "versions": report["versions"], "shard_bytes": target.shard_bytes}
    stored = Stored(job.outline, job.planned)
    outline: Any = job.outline.get_submodule(job.planned.blocks)
    blocks, place = len(outline), Place(job.device, limits or Limits(), unfinished(target.path), on_this_machine())
    activations = plan_activations(outline, job.planned.config, tokens.shape, place)
    with open_run(target, stored, identity) as run, _continued(run, blocks), job.weights:
        if len(run.done) < blocks:
            _solve(job, run, tokens, activations, stages, progress)
        report["linears"] = run.linears
        with stages("finish"):
            return by_the_first(lambda: _finish(job, run, report, extras))


def _finish(job: Job, run: Run | Elsewhere, report: dict[str, Any], extras: Callable[[Path], None]) -> Written:
    assert isinstance(run, Run)
    job.weights.load_rest()
    named = by_stored_names(job.outline, report)
    return run.finish(job.model.state_dict(), model_config(job.outline), named, extras)


def _solve(
    job: Job, run: Run | Elsewhere, tokens: Tensor, activations: Activations, stages: Stages, progress: bool
) -> None:
    wanted, config = frozenset(job.planned.linears), job.planned.config
    loop = BlockLoop(
        job.model,
        tokens,
        config,
        wanted.__contains__,
        job.device,
        inner_loops(job.device, config),
        weights=job.weights,
        activations=activations,
        stage=stages,
    )
    begun, blocks = list(run.done), len(loop.blocks)
    shown = progress and here().rank == 0
    with track("Quantizing", blocks, enabled=shown) as bar, in_background(run.add) as add:
        for index, entry in enumerate(begun):
            loop.replay(index, entry["left"], partial(run.parameters, index, job.device))
            bar.advance(note=f"{entry['block']}, done before")
        if begun and loop.checksum() != begun[-1]["checksum"]:
            warnings.warn(
                "the finished blocks do not give the same bits here as where they were solved: what follows is as "
                "good, but not what one run would give.",
                stacklevel=4,
            )
        for index in range(len(begun), blocks):
            with stages("search"), loop.solved(index) as results, stages("write"):
                add(_solved(loop, index, results))
            reports = {name: result.report for name, result in results.items()}
            warn_fallbacks(loop.name(index), reports)
            bar.advance(note=_note(loop.name(index), reports, stages))


def _note(block: str, reports: Mapping[str, Mapping[str, Any]], stages: Stages) -> str:
    """What a finished block has to say: its loss beside that of plain rounding, and the memory so far."""
    rounding, loss = (_mean(report[key] for report in reports.values()) for key in ("loss_rounding", "loss"))
    memory = ", ".join(f"{size / 1e9:.1f} GB {place}" for place, size in stages.memory().items())
    return f"{block}: loss {loss:.2g} (rounding {rounding:.2g}), {memory}"


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / max(len(known), 1)


def _solved(loop: BlockLoop, index: int, results: Results) -> Solved:
    name, left, checksum = loop.name(index), loop.budget.left, loop.checksum()
    if here().rank:
        return Solved(name, results, {}, left, checksum)  # not to be written here
    cpu = torch.device("cpu")
    weights = {f"{linear}.weight" for linear in results}
    state = {f"{name}.{own}": tensor for own, tensor in loop.blocks[index].state_dict().items()}
    return Solved(
        name,
        {linear: result.to(cpu) for linear, result in results.items()},
        {own: tensor.to(cpu) for own, tensor in state.items() if own not in weights},
        left,
        checksum,
    )


def warn_fallbacks(block: str, reports: Mapping[str, Mapping[str, Any]]) -> None:
    for reason in {report["fallback"] for report in reports.values()} - {None}:
        names = ", ".join(name for name, report in reports.items() if report["fallback"] == reason)
        warnings.warn(f"{block}: {reason} in {names}: rounded plainly.", stacklevel=3)


def _preparation(model: nn.Module, planned: Plan) -> Callable[[str], None]:
    """What makes of a part of the model as transformers has it one as it is quantized."""

    def prepare(name: str) -> None:
        split_experts(model.get_submodule(name))
        for linear in planned.linears:
            if linear.startswith(f"{name}."):
                replace_module(model, linear, as_linear(model.get_submodule(linear)))

    return prepare


@contextmanager
def _continued(run: Run | Elsewhere, blocks: int) -> Iterator[None]:
    """Say with what ends the run how it can be continued."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (
            "the GPU ran out of memory: free some of it, lower --gpu-memory, or use --effort fast, which needs less."
        )
        raise OutOfMemoryError(f"{reason} {_kept(run, blocks)}".strip()) from error
    except (AwqError, KeyboardInterrupt) as error:
        if not run.done:
            raise
        raise type(error)(f"{error} {_kept(run, blocks)}".strip()) from error


def _kept(run: Run | Elsewhere, blocks: int) -> str:
    done = len(run.done)
    return f"{done} of {blocks} blocks are kept: the same command goes on behind them." if done else ""
