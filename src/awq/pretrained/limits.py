"""What is believed of a folder before a library parses it: nothing that would cost without bound, or run code."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from awq.checkpoint.files import inside, read_json
from awq.errors import CheckpointError

# A setting that counts something is the length of a list that transformers makes of it (layer_types, id2label): with
# 100,000 labels that takes a second, with ten times as many half a minute.
MOST = 1 << 17
_COUNTS = re.compile(r"^(?!.*(size|dim)).*(layer|block|expert|head|label|class|depth|stage)")
# transformers fetches a kernel that is named owner/repository from the hub, and runs it.
_CODE = re.compile(r"_implementation")
_READ = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors", ".gguf")
_TEMPLATE_BYTES = 4 << 20


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """CheckpointError for a link that leads out of the folder, and for settings that no model has.

    Headers are checked where they are opened (`TensorFiles`), sizes on the model that the settings make (`outline`).
    """
    for path in sorted([*folder.glob("*"), *folder.glob("*/*.jinja")]):
        if path.suffix in _READ:
            inside(folder, str(path.relative_to(folder)))
    for name in ("config.json", "generation_config.json"):
        check_settings(folder / name, read_json(folder, name) or {}, trust_remote_code)


def check_settings(path: Path, settings: dict[str, Any], trust_remote_code: bool = False) -> None:
    """CheckpointError for a count, at any depth, that no model has, and for code that was not asked for."""
    for key, value in _leaves(settings):
        if isinstance(value, int) and abs(value) > MOST and _COUNTS.search(key):
            raise CheckpointError(f"{path} sets {key} to more than {MOST}, which no model has: do not use it.")
        if isinstance(value, str) and "/" in value and _CODE.search(key) and not trust_remote_code:
            raise CheckpointError(
                f"{path} sets {key} to {value[:80]!a}, code that would be fetched from the hub: remove that setting, "
                "or pass trust_remote_code if you trust it."
            )


def check_tokenizer(folder: Path) -> None:
    """CheckpointError for a chat template of absurd size, and for what makes tokenizers abort the process."""
    for path in sorted([*folder.glob("*.jinja"), *folder.glob("*/*.jinja")]):
        if not path.is_file() or path.stat().st_size > _TEMPLATE_BYTES:
            raise CheckpointError(f"{path} is no chat template of less than 4 MiB: copy or download it again.")
    read_json(folder, "tokenizer_config.json")
    content = read_json(folder, "tokenizer.json") or {}
    for key, value in _leaves({"normalizer": content.get("normalizer")}):
        if key == "precompiled_charsmap" and not _holds_its_table(value):
            raise CheckpointError(f"{folder / 'tokenizer.json'} has a damaged precompiled_charsmap: copy it again.")


def _holds_its_table(charsmap: object) -> bool:
    """Whether the table's size, the first four bytes, is covered by what follows."""
    try:
        table = base64.b64decode(str(charsmap), validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(table) > 4 and int.from_bytes(table[:4], "little") <= len(table) - 4


def _leaves(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value that is no container and the key it is under, at any depth."""
    todo: list[tuple[str, Any]] = [("", settings)]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += ((key if _CODE.search(key) else str(name), item) for name, item in value.items())
        elif isinstance(value, list):
            todo += ((key, item) for item in value)
        else:
            yield key, value
