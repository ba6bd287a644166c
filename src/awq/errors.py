"""The error tree: every message is one sentence that names the thing, why, and the way out."""

from __future__ import annotations


class AwqError(Exception):
    """Base of every error that this package raises on purpose; the command line exits 2 on it.

    ended_all: of several processes it ended all, and this one says why
    """

    ended_all = False


class ConfigError(AwqError, ValueError):
    """A setting is unknown, out of range, or does not fit the model."""


class ModelNotFoundError(AwqError, FileNotFoundError):
    """The model folder, file or hub id does not exist or may not be read."""


class CheckpointError(AwqError, ValueError):
    """A checkpoint is damaged, incomplete, unsafe, or of a format that is not read."""


class OutputExistsError(AwqError, FileExistsError):
    """The output folder holds something that would be overwritten."""


class CalibrationError(AwqError, ValueError):
    """The calibration text is missing, empty or too short."""


class UnsupportedModelError(AwqError, TypeError):
    """The model has nothing that can be quantized, with the reason."""


class KernelNotSupportedError(AwqError, RuntimeError):
    """This hardware cannot run the kernel version; the text says what it needs and what to use."""


class KernelError(AwqError, RuntimeError):
    """A kernel does not compile, load or launch; the text has the compiler's or the driver's reason."""


class OutOfMemoryError(AwqError, RuntimeError):
    """The device has too little memory; the text says what would fit."""


class MissingDependencyError(AwqError, ImportError):
    """An optional package is needed; the text names it and the command that installs it."""


class EndedElsewhereError(AwqError, RuntimeError):
    """Another of the processes that quantize together has failed, and said why."""
