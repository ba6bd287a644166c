"""A run over a folder, from the first block to the checkpoint: it can end at any moment, and go on."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from awq.algorithm.result import Results
from awq.checkpoint.files import REPORT_FILE
from awq.checkpoint.journal import Entry, Journal, changes
from awq.checkpoint.output import check_output, publish, unfinished
from awq.checkpoint.read import OUTLIER_FOLDER, open_checkpoint
from awq.checkpoint.shards import ShardWriter, reported, write_json
from awq.checkpoint.slots import Slots, digest, file_digest, sync
from awq.checkpoint.write import Written, linear_tensors, quantization_config, warnings_of
from awq.errors import CheckpointError, OutputExistsError
from awq.packing import PackedInt4
from awq.storage.stored import Stored

# What in an identity is a checksum, by what it is of.
_SPOKEN = {
    "recipe.model.fingerprint": "the model's files",
    "recipe.calibration.tokens_sha256": "the calibration text",
}
EXACT = "exact/"  # before the name of a float32 value that its stored dtype does not hold


@dataclass(frozen=True)
class Target:
    """Where and how a checkpoint is written."""

    path: Path
    shard_bytes: int
    overwrite: bool = False
    verify: str = "quick"


@dataclass(frozen=True)
class Solved:
    """What a block came to, on the CPU.

    floats:   its other parameters and buffers, by full name, as `BlockLoop.solved` left them
    left:     what it left of the budget of outlier channels
    checksum: of the streams behind it
    """

    name: str
    results: Results
    floats: dict[str, Tensor]
    left: float
    checksum: int


class Run:
    """What is on the disk of an output: the finished blocks in their places, and the journal of them."""

    def __init__(self, target: Target, stored: Stored) -> None:
        self.target, self.stored = target, stored
        self.work = unfinished(target.path)
        self.stage, self.parts = self.work / "checkpoint", self.work / "parts"
        self.slots = Slots(self.stage, stored.outlines, target.shard_bytes)
        check_output(target.path, target.overwrite, self.slots.missing_bytes)
        self.journal = Journal.open(self.work)

    @classmethod
    @contextmanager
    def open(cls, target: Target, stored: Stored, identity: Mapping[str, Any]) -> Iterator[Self]:
        """A run that ends with its journal closed: what can be continued stays, anything else is removed.

        identity: what it must have in common with a run that it continues
        """
        run = cls(target, stored)
        try:
            run._begin(identity)
            yield run
        finally:
            run.journal.close()
            if not run.done:
                shutil.rmtree(run.work, ignore_errors=True)

    @property
    def done(self) -> list[Entry]:
        return self.journal.done

    @property
    def linears(self) -> dict[str, Any]:
        """The reports of the blocks that are done, by linear."""
        return reports(self.done)

    def add(self, solved: Solved) -> None:
        """A block's results to the disk, then its line to the journal."""
        tensors, beside = self._tensors(solved)
        for name, tensor in tensors.items():
            self.slots.fill(name, tensor)
        self.slots.sync(tensors)
        part = self._part(len(self.done))
        _save(part, beside)
        self.journal.add(
            {
                "block": solved.name,
                "left": solved.left,
                "checksum": solved.checksum,
                "digest": digest(tensors[name] for name in self.stored.names_of(solved.name)),
                "part": file_digest(part),
                "linears": {name: result.report for name, result in solved.results.items()},
            }
        )

    def parameters(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """What `BlockLoop.solved` left of a block that is done, by name in it, the linears on `device`."""
        block, load = self.done[index]["block"], self.slots.load
        state: dict[str, Tensor] = {}
        for name in self.done[index]["linears"]:
            stored = self.stored.linears[name]
            packed = PackedInt4(*(load(f"{stored}.{part}") for part in ("qweight", "qzeros", "scales")))
            state[f"{name}.weight"] = packed.to(device).dequantize()
            if f"{stored}.bias" in self.stored.outlines:
                state[f"{name}.bias"] = load(f"{stored}.bias")
        names = (name for name in self.stored.floats if name.startswith(f"{block}."))
        state |= {name: load(self.stored.floats[name].stored) for name in names}
        beside = _load(self._part(index))
        state |= {name.removeprefix(EXACT): tensor for name, tensor in beside.items() if name.startswith(EXACT)}
        return {name.removeprefix(f"{block}."): tensor for name, tensor in state.items()}

    def finish(
        self,
        rest: Mapping[str, Tensor],
        config: Mapping[str, Any],
        report: Mapping[str, Any],
        extras: Callable[[Path], None],
    ) -> Written:
        """Add what lies outside of the blocks and the files beside the weights; then the folder takes its place."""
        for name in self.stored.outside:
            self.slots.fill(*self.stored.float_of(name, rest[name]))
        self.slots.write_index()
        self._write_outliers()
        extras(self.stage)
        quant = self.stored.quant
        write_json(self.stage / REPORT_FILE, report)
        write_json(self.stage / "config.json", {**config, "quantization_config": quantization_config(quant)})
        self._verify()
        files = [path for path in self.stage.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        for path in (*files, self.stage):
            sync(path)
        publish(self.stage, self.target.path, self.target.overwrite)
        sync(self.target.path.parent)
        shutil.rmtree(self.work, ignore_errors=True)
        return Written(self.target.path, size, warnings_of(self.stored.shapes, quant))

    def _begin(self, identity: Mapping[str, Any]) -> None:
        before = self.journal.identity
        if before is not None and (found := changes(before, dict(identity), _SPOKEN)):
            if not self.target.overwrite:
                raise OutputExistsError(
                    f"{self.work} holds an unfinished run that differs in {', '.join(found)}: finish it with the "
                    "command that began it, or start anew with --overwrite."
                )
            self.journal.forget()
        if self.journal.identity is None:
            for leftover in (self.stage, self.parts):
                shutil.rmtree(leftover, ignore_errors=True)
            self.journal.add(identity)
        whole = sum(1 for _ in self._whole())
        if whole < len(self.done) or self.journal.damaged:
            warnings.warn(
                f"{self.work} is damaged behind {whole} finished blocks: it goes on from there.", stacklevel=4
            )
            self.journal.forget(whole)
        self.slots.allocate()

    def _whole(self) -> Iterator[Entry]:
        """The finished blocks up to the first that is not on the disk as it was written."""
        for index, entry in enumerate(self.done):
            names = self.stored.names_of(entry["block"])
            if entry["digest"] != self.slots.digest(names) or entry["part"] != file_digest(self._part(index)):
                return
            yield entry

    def _tensors(self, solved: Solved) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By stored name, what belongs into the shards, and what is kept beside them."""
        tensors: dict[str, Tensor] = {}
        beside: dict[str, Tensor] = {}
        for name, result in solved.results.items():
            linear = self.stored.linears[name], result.packed, result.bias, result.outliers
            _, own, kept = linear_tensors(linear, self.stored.quant)
            tensors |= own
            beside |= kept
        tensors |= dict(
            self.stored.float_of(name, value) for name, value in solved.floats.items() if self._is_float(name)
        )
        exact = self.stored.exact(solved.floats)
        return tensors, beside | {f"{EXACT}{name}": value for name, value in exact.items()}

    def _is_float(self, name: str) -> bool:
        return name in self.stored.floats

    def _part(self, index: int) -> Path:
        return self.parts / f"block-{index:05d}.safetensors"

    def _write_outliers(self) -> None:
        shutil.rmtree(self.stage / OUTLIER_FOLDER, ignore_errors=True)
        writer = ShardWriter(self.stage / OUTLIER_FOLDER, self.target.shard_bytes, self.target.verify)
        for index in range(len(self.done)):
            for name, tensor in _load(self._part(index)).items():
                if not name.startswith(EXACT):
                    writer.add(name, tensor)
        writer.finish()

    def _verify(self) -> None:
        """Read back what was written: "quick" the first block, "full" all of them."""
        count = {"none": 0, "quick": 1}.get(self.target.verify, len(self.done))
        for entry in self.done[:count]:
            if entry["digest"] != self.slots.digest(self.stored.names_of(entry["block"])):
                raise CheckpointError(
                    f"{entry['block']} in {self.stage} reads back changed: the disk is at fault; rerun."
                )
        if count:
            open_checkpoint(self.stage)


def reports(entries: Iterable[Entry]) -> dict[str, Any]:
    """Of blocks that are done, by linear."""
    return {name: report for entry in entries for name, report in entry["linears"].items()}


@contextmanager
def in_background(add: Callable[[Solved], None]) -> Iterator[Callable[[Solved], None]]:
    """`add` in a thread, one block at a time; its errors come with the next, or at the end."""
    with ThreadPoolExecutor(1, "awq-write") as writer:
        pending: Future[None] | None = None

        def submit(solved: Solved) -> None:
            nonlocal pending
            if pending:
                pending.result()
            pending = writer.submit(add, solved)

        yield submit
        if pending:
            pending.result()


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Small tensors as a file that is on the disk when this returns; none for none."""
    if not tensors:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    with reported(path):
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
        sync(path)
        sync(path.parent)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
