"""What readers of damaged files and unknown architectures raise, as one sentence that names the model."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError

from awq.errors import AwqError, CheckpointError

# Each has been seen.
_UNREADABLE = (
    *(OSError, ValueError, LookupError, ImportError, RuntimeError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, MemoryError, struct.error, StrictDataclassError, TemplateError),
)


@contextmanager
def one_sentence(name: object, part: str) -> Iterator[None]:
    """Turn what transformers raises for an unreadable model into a CheckpointError that names it."""
    try:
        yield
    except AwqError:
        raise
    except BaseException as error:
        if not _is_unreadable(error):
            raise
        raise CheckpointError(f"cannot read the {part} of {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The first line, and the second where the first only announces it."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first


def _is_unreadable(error: BaseException) -> bool:
    """Whether a reader raised it; tokenizers, in Rust, raises bare exceptions, and panics that are none."""
    return isinstance(error, _UNREADABLE) or type(error) is Exception or type(error).__name__ == "PanicException"
