"""The output folder: what may be replaced, and how a finished folder takes its place in one step."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from awq.checkpoint.files import REPORT_FILE, read_json
from awq.errors import AwqError, CheckpointError, ConfigError, OutputExistsError


def output_path(folder: Any) -> Path:
    """The absolute path of an output folder; ConfigError for an empty name, as of a variable that the shell lacks."""
    if not isinstance(folder, str | os.PathLike) or folder == "":
        raise ConfigError(f"{folder!r} names no output folder: give the folder to write.")
    return Path(folder).expanduser().resolve()


def check_output(folder: str | Path, overwrite: bool = False, expected_bytes: int = 0) -> Path:
    """The absolute path of an output folder that can be written, before any long work.

    expected_bytes: space that the new folder takes beside an old one, which stays until the new one is complete
    OutputExistsError when it is not empty and `overwrite` is False; ConfigError or AwqError when nothing can be
    written there.
    """
    path = output_path(folder)
    if path.exists() and not path.is_dir():
        raise OutputExistsError(f"{path} is a file: choose a folder.")
    if path.is_dir() and any(path.iterdir()):
        _check_replaceable(path, overwrite)
    _check_place(path, expected_bytes)
    return path


def finished_recipe(folder: str | Path) -> dict[str, Any] | None:
    """The recipe of a complete checkpoint folder, from its report; None when there is none.

    A folder is moved into place only when complete, so that a report means a finished run.
    """
    try:
        report = read_json(Path(folder).expanduser(), REPORT_FILE) or {}
    except CheckpointError:
        return None
    recipe = report.get("recipe")
    return recipe if isinstance(recipe, dict) else None


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its place on success and is removed on any exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    stage = _sibling(target, "partial")
    stage.mkdir()
    try:
        yield stage
        publish(stage, target, overwrite)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _check_replaceable(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputExistsError(f"{path} is not empty: choose another folder, or replace it with --overwrite.")
    here = Path.cwd()
    if path in (Path.home(), here, *here.parents) or (path / ".git").exists() or not _is_quantized(path):
        raise OutputExistsError(
            f"{path} holds something else than a quantized checkpoint, which --overwrite does not replace: "
            "choose another folder, or remove it yourself."
        )


def _is_quantized(path: Path) -> bool:
    try:
        config = read_json(path, "config.json") or {}
    except CheckpointError:
        return False
    return "quantization_config" in config or (path / "quant_config.json").exists()


def _check_place(path: Path, expected_bytes: int) -> None:
    if os.path.ismount(path):
        raise ConfigError(f"{path} is a mount point, which cannot be replaced in one step: choose a folder inside it.")
    parent = next(place for place in path.parents if place.exists())
    if not parent.is_dir():
        raise ConfigError(f"{path} cannot be made, because {parent} is a file: choose another folder.")
    try:
        Path(tempfile.mkdtemp(dir=parent)).rmdir()
    except OSError as error:
        raise AwqError(f"{parent} cannot be written to ({error.strerror}): choose another output folder.") from None
    if (free := shutil.disk_usage(parent).free) < expected_bytes:
        raise AwqError(
            f"{path} needs {expected_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free: make room or "
            "choose another disk."
        )


def unfinished(target: Path) -> Path:
    """Where a run that can be continued keeps its journal, and what it has written so far."""
    return target.with_name(f".{target.name}.unfinished")


def publish(stage: Path, target: Path, overwrite: bool) -> None:
    """Put a complete folder in the place of `target`, which may be one to overwrite."""
    _share(stage)
    _replace(check_output(target, overwrite), stage)
    _sweep(target)


def _share(stage: Path) -> None:
    """Give every file the permissions of the user's umask; safetensors makes its files private."""
    mode = stage.stat().st_mode & 0o666
    for path in stage.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _replace(target: Path, stage: Path) -> None:
    if not target.exists():
        stage.rename(target)
        return
    old = _sibling(target, "replaced")
    target.rename(old)
    try:
        stage.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed runs left behind: their process, named last, is gone."""
    kinds = ("partial", "replaced") if target.exists() else ("partial",)
    for left in (path for kind in kinds for path in target.parent.glob(f".{target.name}.{kind}-*")):
        process = left.name.rpartition("-")[2]
        if not process.isdigit() or int(process) == os.getpid() or not _runs(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sibling(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}-{os.getpid()}")
