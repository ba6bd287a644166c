"""Which kernel runs a linear, and as which version: a value with its reason, or an error with all of them."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from awq.capability import OWN_KERNELS
from awq.config import KERNEL_VERSIONS, canonical_version
from awq.errors import ConfigError, KernelNotSupportedError
from awq.hardware import Device, default_device, describe, detect, parse_capability, refusal
from awq.kernels.base import EVERY_ROW, Kernel, LinearSpec, Weights
from awq.kernels.cpu import CpuInt4
from awq.kernels.cuda import Cuda
from awq.kernels.portable import Portable
from awq.kernels.reference import Reference

__all__ = [
    "KERNELS",
    "UNPREPARED",
    "Choice",
    "Kernel",
    "LinearSpec",
    "VersionChoice",
    "pinned_version",
    "select",
    "select_kernel_version",
]

# In order of preference: the first that does not reject a linear runs it.
KERNELS: tuple[Kernel, ...] = (CpuInt4(), Cuda(), Portable(), Reference())

_NOT_SUPPORTED = "Kernel version not supported on this hardware"
# What `select_kernel_version` asks about: a linear that every kernel takes.
_TYPICAL = LinearSpec(in_features=4096, out_features=4096, group_size=128)


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a linear.

    version: the one pinned for every call, or None: chosen by rows
    reason:  why this kernel, in a few words
    refused: kernel name -> why it was passed over
    """

    kernel: Kernel
    version: str | None
    reason: str
    refused: dict[str, str] = field(default_factory=dict)

    def gemv_rows(self, spec: LinearSpec, device: Device | torch.device, weights: Weights | None = None) -> int:
        """Up to how many rows calls go to GEMV: all or none where a version is pinned, else where the two cross."""
        if self.version:
            return EVERY_ROW if self.version == "GEMV" else 0
        return self.kernel.gemv_rows(spec, device, weights)


# What runs a linear that no kernel was chosen for yet.
UNPREPARED = Choice(Reference(), None, "reference: not prepared for its device yet")


@dataclass(frozen=True)
class VersionChoice:
    """ "GEMM" or "GEMV", why, by which kernel and how, and why the other version was not taken."""

    version: str
    reason: str
    refused: dict[str, str]
    kernel: str
    how: str


def select(
    spec: LinearSpec, device: Device | torch.device | str | int, version: str | None = None, kernel: str | None = None
) -> Choice:
    """The kernel for `spec` on `device`.

    version: "GEMM" or "GEMV" pins it; None or "auto" needs a kernel that runs both
    kernel:  the name of the only one to consider
    Raises KernelNotSupportedError with every reason, ConfigError for an unknown name.
    """
    target, pinned = describe(device), pinned_version(version)
    if needs := refusal(target):
        raise KernelNotSupportedError(_sentence(needs, pinned))
    refused: dict[str, str] = {}
    for candidate in _candidates(kernel):
        reason = _rejection(candidate, spec, target, pinned)
        if reason is None:
            _say_fallback(candidate, target, refused)
            how = [f"{each} by {candidate.how(each, target)}" for each in ((pinned,) if pinned else KERNEL_VERSIONS)]
            return Choice(candidate, pinned, f"{candidate.name}: {'; '.join(how)}", refused)
        refused[candidate.name] = reason
    reasons = "; ".join(f"kernel {name!r}: {reason}" for name, reason in refused.items())
    raise KernelNotSupportedError(f"{_NOT_SUPPORTED}: {target}: {reasons}; leave out kernel= to let one be chosen.")


def select_kernel_version(
    capability: object = None,
    rows: int = 1,
    version: str | None = None,
    device: Device | torch.device | str | int | None = None,
    kernel: str | None = None,
) -> VersionChoice:
    """The kernel version for calls of `rows` rows (tokens x batch): GEMV for a few, GEMM for many.

    capability: (8, 6) or "8.6" asks about a GPU that need not be here; else `device`, else torch's own default
    version:    "GEMM" or "GEMV", in any spelling that checkpoints use, is taken where the hardware runs it
    Raises KernelNotSupportedError where it does not, ConfigError for values that mean nothing.
    """
    if rows < 0:
        raise ConfigError(f"rows={rows!r} is no number of rows: give 0 or more.")
    target = _target(capability, device)
    choice = select(_TYPICAL, target, version, kernel)
    limit = choice.kernel.gemv_rows(_TYPICAL, target)
    taken = choice.version or ("GEMV" if rows <= limit else "GEMM")
    other = "GEMM" if taken == "GEMV" else "GEMV"
    count = "1 row" if rows == 1 else f"{rows} rows"
    if choice.version:
        why, why_not = f"{taken}{_alias(version)} for every call, as asked", f"version={version!r} was asked for"
    else:
        why = f"{taken} for {count}: GEMV serves up to {limit} rows, GEMM more"
        why_not = f"it serves {'more than' if taken == 'GEMV' else 'up to'} {limit} rows"
    how = choice.kernel.how(taken, target)
    if reason := _passed_over(choice.kernel, target, choice.refused):
        how += f" ({target.kind!r} does not run: {reason})"
    how += _unusable(target)
    return VersionChoice(taken, f"{why}; {target} runs it by {how}", {other: why_not}, choice.kernel.name, how)


def pinned_version(version: str | None, notice: bool = False) -> str | None:
    """ "GEMM" or "GEMV" for any spelling of it, None for None and "auto"; ConfigError for the rest.

    notice: warn where the version is another's name ("marlin", "gemv_fast"), which runs as GEMM or GEMV here
    """
    if version is None or str(version).lower() == "auto":
        return None
    pinned = canonical_version(version)
    if notice and version.upper() != pinned:
        warnings.warn(f"version {version!r} means {pinned} here, with the same result.", stacklevel=3)
    return pinned


def _candidates(name: str | None) -> tuple[Kernel, ...]:
    if name is None:
        return KERNELS
    named = tuple(kernel for kernel in KERNELS if kernel.name == name)
    if not named:
        raise ConfigError(f"unknown kernel {name!r}: the kernels are {', '.join(kernel.name for kernel in KERNELS)}.")
    return named


def _rejection(kernel: Kernel, spec: LinearSpec, device: Device, pinned: str | None) -> str | None:
    missing = [version for version in ((pinned,) if pinned else KERNEL_VERSIONS) if version not in kernel.versions]
    return f"it has no {' and no '.join(missing)}" if missing else kernel.rejects(spec, device)


def _target(capability: object, device: Device | torch.device | str | int | None) -> Device:
    if capability is not None:
        return Device(0, "a GPU", "cuda", parse_capability(capability), hypothetical=True)
    return default_device() if device is None else describe(device)


def _sentence(needs: str, pinned: str | None) -> str:
    asked = pinned or " and ".join(KERNEL_VERSIONS)
    return f"{_NOT_SUPPORTED}: {needs} to run {asked}; use device='cpu', or another GPU ('awq hardware' lists them)."


def _alias(version: str | None) -> str:
    return "" if version is None or version in KERNEL_VERSIONS else f" (which {version!r} means here)"


def _unusable(device: Device) -> str:
    """What stands between the user and a GPU that is here."""
    if device.kind == "cuda" and not device.hypothetical and device.torch_device is None:
        return f"; torch {torch.__version__} cannot use it: install a CUDA build of torch that fits its driver"
    if device.kind == "cpu" and (idle := [gpu.name for gpu in detect() if gpu.torch_device is None]):
        return f"; torch {torch.__version__} cannot use the {idle[0]} that is here"
    return ""


def _passed_over(kernel: Kernel, device: Device, refused: dict[str, str]) -> str | None:
    """Why `portable` runs, and not the kernel made for this kind of device, whose name is the kind's."""
    return refused.get(device.kind) if kernel.name == "portable" else None


def _say_fallback(kernel: Kernel, device: Device, refused: dict[str, str]) -> None:
    expected = device.kind == "cuda" and (device.hypothetical or (device.capability or OWN_KERNELS) < OWN_KERNELS)
    reason = _passed_over(kernel, device, refused)
    if reason and not expected:
        _say_once(f"linears run on the slower 'portable' kernel, since {reason}")


@lru_cache
def _say_once(message: str) -> None:
    logging.getLogger("awq").warning(message)
