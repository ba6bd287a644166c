"""Several processes, started by torchrun on one machine or more, that quantize as one."""

from __future__ import annotations

import atexit
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from awq.algorithm.ranks import Ranks, among, here
from awq.errors import AwqError, ConfigError, EndedElsewhereError
from awq.pretrained.source import pick_device

P = ParamSpec("P")
T = TypeVar("T")

# While one process writes the checkpoint the others wait. One that dies takes the others along: by its connection
# (gloo), or by torchrun.
TIMEOUT = timedelta(days=1)
_SIZE, _SHORT = 8, 256  # bytes of a word's size, and of most words, which are told at once with it
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENDED, _HEARD = "awq/ended", "awq/heard"
_FAREWELL = 2.0  # seconds that the one to end waits for the others to hear of it: the store may be its own


class Processes(Ranks):
    """The processes of torch.distributed: words go by gloo; tensors by NCCL where they are on GPUs."""

    def __init__(self, device: torch.device, store: Store | None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device, self.store = device, store
        self._words = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._tensors = dist.new_group(backend="nccl", timeout=TIMEOUT) if device.type == "cuda" else self._words

    def tell(self, value: Any) -> list[Any]:
        word = json.dumps(value).encode()
        told = self._told(len(word).to_bytes(_SIZE, "little") + word[:_SHORT], _SIZE + _SHORT)
        sizes = [int.from_bytes(one[:_SIZE], "little") for one in told]
        words = [one[_SIZE:] for one in told]
        if max(sizes) > _SHORT:
            words = [*map(bytes.__add__, words, self._told(word[_SHORT:], max(sizes) - _SHORT))]
        return [json.loads(one[:size]) for one, size in zip(words, sizes, strict=True)]

    def _told(self, word: bytes, size: int) -> list[bytes]:
        """Every rank's word, with zeros up to `size`."""
        own = torch.frombuffer(bytearray(word.ljust(size, b"\0")), dtype=torch.uint8)
        words = [torch.empty_like(own) for _ in range(self.size)]
        with _connected(self):
            dist.all_gather(words, own, group=self._words)
        return [bytes(one.tolist()) for one in words]

    def hand_out(self, tensor: Tensor, source: int = 0) -> Tensor:
        with _connected(self):
            dist.broadcast(tensor, source, group=self._tensors)
        return tensor

    def gather(self, out: Tensor, rows: Mapping[int, slice]) -> None:
        """At once where each has as many, else one after the other."""
        sizes = [rows[rank].stop - rows[rank].start for rank in rows]
        if len(rows) < self.size or len(set(sizes)) > 1:
            for rank, some in rows.items():
                self.hand_out(out[some], rank)
            return
        with _connected(self):
            dist.all_gather_into_tensor(out, out[rows[self.rank]].clone(), group=self._tensors)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Each rank sums some of the rows, of which it is sent all others' part."""
        rows = self._rows(total)
        own = total[rows[self.rank]]
        received = part.new_empty(self.size * len(own), *part.shape[1:])
        sizes = [len(total[some]) for some in rows]
        with _connected(self):
            dist.all_to_all_single(received, part, [len(own)] * self.size, sizes, group=self._tensors)
        for theirs in received.view(self.size, *own.shape):
            own += theirs

    def complete(self, total: Tensor) -> None:
        self.gather(total, dict(enumerate(self._rows(total))))

    def leave(self) -> None:
        """Whoever waits for a word from this process is told that none will come."""
        if self not in _joined:
            return
        _joined.remove(self)
        dist.destroy_process_group(self._words)
        deadline = time.monotonic() + _FAREWELL
        with suppress(RuntimeError):
            while self.store is not None and self.store.add(_HEARD, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.02)

    def _rows(self, total: Tensor) -> list[slice]:
        bounds = [len(total) * rank // self.size for rank in range(self.size + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]


@contextmanager
def together(device: torch.device | None = None) -> Iterator[Ranks]:
    """All processes that torchrun has started, at work on one model; a world of one where it has started none.

    Rank 0 alone warns and shows how far it is. An error on one rank is raised there, and ends the others by an
    EndedElsewhereError. device: of this process; None where they have worked together before, if they have
    """
    ranks = _join(device)
    try:
        with among(ranks), warnings.catch_warnings():
            if ranks.rank:
                warnings.simplefilter("ignore")
            if device is not None:
                agree("the setup", _setup(device))
            yield ranks
    except EndedElsewhereError:
        raise
    except BaseException as error:
        _claim(ranks, error)
        raise


def in_company(function: Callable[P, T]) -> Callable[P, T]:
    """`function` for all processes together; its keyword `device`, which may mean those of all, is given as its own."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        kwargs["device"] = device = own_device(pick_device(cast(str, kwargs.get("device", "auto"))))
        with together(device):
            return function(*args, **kwargs)

    return run


def own_device(device: torch.device) -> torch.device:
    """The device of this process where `device` stands for those of all; ConfigError where it has none."""
    if device.type != "cuda" or _world() == 1:
        return device
    local, count = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))), torch.cuda.device_count()
    if device.index not in (None, local):
        raise ConfigError(f"{device} is one GPU for {_world()} processes: leave the device out, each takes its own.")
    if local >= count:
        raise ConfigError(
            f"process {local} of this machine has no GPU: torch sees {count}; start no more processes than that "
            "(--nproc-per-node), or use the CPU (--device cpu)."
        )
    return torch.device("cuda", local)


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if _world() > 1 else 1


def agree(what: str, value: Mapping[str, Any]) -> None:
    """ConfigError where `value`, as JSON has it, is not the same on all ranks."""
    told = here().tell(value)
    other = next((rank for rank, theirs in enumerate(told) if theirs != told[0]), None)
    if other is not None:
        differ = ", ".join(name for name in value if told[other].get(name) != told[0].get(name))
        raise ConfigError(
            f"{what} of process {other} is not that of process 0 ({differ}): start all processes with the same "
            "arguments, files and versions, on GPUs of one kind."
        )


_joined: list[Processes] = []


def _join(device: torch.device | None) -> Ranks:
    if _world() == 1 or (device is None and not _joined):
        return Ranks()
    if device is not None and not _joined:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _joined.append(Processes(device, _initialize()))
    return _joined[0]


def _initialize() -> Store | None:
    if dist.is_initialized():
        return None
    store: Store
    store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    atexit.register(_leave)
    return store


def _leave() -> None:
    """Not after an error: others may never come to it."""
    if dist.is_initialized() and _joined and not _has_ended(_joined[0]):
        dist.destroy_process_group()


def _setup(device: torch.device) -> Mapping[str, Any]:
    """What must be alike for the same operation to give the same bits."""
    if device.type == "cuda":
        return {"torch": torch.__version__, "GPU": torch.cuda.get_device_name(device)}
    return {"torch": torch.__version__, "CPU": platform.machine(), "threads": torch.get_num_threads()}


@contextmanager
def _connected(ranks: Processes) -> Iterator[None]:
    """What torch raises where another process has gone, as a sentence."""
    try:
        yield
    except RuntimeError as error:
        if _has_ended(ranks):
            raise EndedElsewhereError("another process has ended the run.") from error
        raise AwqError("a process that quantized along with this one is gone: start again.") from error


def _has_ended(ranks: Processes) -> bool:
    with suppress(RuntimeError):  # the store itself may be gone
        if ranks.store is not None and ranks.store.check([_ENDED]):
            ranks.store.add(_HEARD, 1)
            return True
    return False


def _claim(ranks: Ranks, error: BaseException) -> None:
    """Note that this rank's error ends the run; EndedElsewhereError where another's has.

    An interrupt comes to all of them, each of which may be the one to tell of it.
    """
    store, own, first = ranks.store if isinstance(ranks, Processes) else None, str(ranks.rank), None
    with suppress(RuntimeError):
        first = store and store.compare_set(_ENDED, "", own).decode()
    if isinstance(ranks, Processes) and first not in (None, own):
        _has_ended(ranks)
        if isinstance(error, KeyboardInterrupt):
            return
        raise EndedElsewhereError("another process has ended the run.") from error
    if isinstance(error, AwqError):
        error.ended_all = True
    if isinstance(ranks, Processes):
        ranks.leave()


def _world() -> int:
    """How many processes there are: as torch.distributed has it, or as torchrun has told."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1
