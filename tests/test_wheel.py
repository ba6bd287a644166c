"""The built wheel in a fresh environment, outside the checkout: both commands, and a script written for AutoAWQ."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import awq
from tests.tiny import save_tiny, tiny_llama, user_script

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[1]


def run(folder: Path, *command: str | Path) -> str:
    """The standard output of a command run in `folder`, where nothing of the checkout is on the path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    run(CHECKOUT, *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, CHECKOUT)
    (built,) = folder.glob("awq_int4-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it; what it depends on is this environment's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run(folder, python, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is only appended: an editable install of this package there has no effect.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where = run(folder, python, "-c", "import awq; print(awq.__file__)")
    assert Path(where.strip()).is_relative_to(packages)
    return python


@pytest.fixture
def playground(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "llama-tiny", tiny_llama(max_position_embeddings=512))
    return tmp_path


def test_wheel_holds_all_of_the_package(wheel: Path) -> None:
    source = Path(awq.__file__).parent
    files = {path.relative_to(source.parent).as_posix() for path in source.rglob("*") if path.is_file()}
    kept = {name for name in files if "__pycache__" not in name}
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert built == kept


def test_quantize_and_generate(python: Path, playground: Path) -> None:
    command = python.parent / "awq"
    quantize = ["quantize", "llama-tiny", "--output", "llama-awq", "--group-size", "32", "--samples", "8"]
    run(playground, command, *quantize, "--seq-len", "64")
    assert (playground / "llama-awq" / "awq_report.json").is_file()
    assert run(playground, command, "generate", "llama-awq", "--prompt", "The sea was", "--max-new-tokens", "8")
    assert run(playground, python, "-m", "awq", "hardware")


def test_script_written_for_autoawq(python: Path, playground: Path) -> None:
    (playground / "script.py").write_text(user_script("llama-tiny"))
    run(playground, python, "script.py")
    assert (playground / "llama-tiny-awq" / "config.json").is_file()
