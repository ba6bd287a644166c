"""The shape of the house: imports go one way, nothing is too long, and `import awq` is light."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import awq

ROOT = Path(awq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
FILE_LINES, FUNCTION_LINES = 300, 60

GROUND = {"capability", "config", "errors", "hardware", "packing"}
# Which other rooms a room may import: every arrow of the design, none back.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "packing": {"config", "errors"},
    "capability": {"config", "errors"},
    "hardware": {"capability", "config", "errors"},
    "progress": {"errors"},
    "bounds": set(),
    "jit": {"errors"},
    "kernels": {"jit"} | GROUND,
    "linear": {"kernels"} | GROUND,
    "engine": {"jit", "kernels", "linear"} | GROUND,
    "linears": set(),
    "experts": {"linears"},
    "algorithm": {"config", "errors", "experts", "linears", "packing"},
    "checkpoint": {"config", "errors", "packing"},
    "hub": {"checkpoint", "config", "errors"},
    "data": {"errors"},
    "calibration": {"config", "data", "errors"},
    "evaluate": {"config", "data", "errors"},
    "unreadable": {"errors"},
    "outline": {"checkpoint", "errors"},
    "source": {"checkpoint", "config", "errors", "hardware", "outline", "unreadable"},
    "names": {"errors", "experts"},
    "plan": {"algorithm", "config", "errors", "experts", "linears"},
    "effort": {"algorithm", "config", "errors", "kernels", "linears"},
    "weights": {"algorithm", "checkpoint", "errors", "linears", "source"},
    "processes": {"algorithm", "errors", "source"},
    "save": {"algorithm", "checkpoint", "config", "linear", "names", "processes", "source"},
    "stored": {"linears", "names", "packing", "plan", "save"},
    "stages": set(),
    "memory": {"algorithm", "config", "errors", "linears"},
    "run": {"algorithm", "checkpoint", "errors", "packing", "stored"},
    "elsewhere": {"algorithm", "checkpoint", "run", "stored"},
    "job": {"algorithm", "checkpoint", "effort", "elsewhere", "experts", "linears", "memory", "names", "plan"}
    | {"processes", "progress", "run", "save", "source", "stages", "stored", "weights"}
    | GROUND,
    "recipe": {"algorithm", "calibration", "checkpoint", "effort", "experts", "job", "linear", "linears", "memory"}
    | {"plan", "processes", "progress", "run", "save", "source", "stages"}
    | GROUND,
    "place": {"errors", "linear"},
    "load": {"checkpoint", "engine", "experts", "kernels", "linear", "linears", "names", "outline", "place", "source"}
    | {"unreadable"}
    | GROUND,
    "model": {"calibration", "checkpoint", "engine", "load", "place", "processes", "recipe", "save", "source"} | GROUND,
    "compat": {"evaluate", "linear", "model"} | GROUND,
}
# The top of the house sees everything below it, and nobody below sees it.
ALLOWED["bench"] = set(ALLOWED)
ALLOWED["cli"] = ALLOWED["__main__"] = ALLOWED["bench"] | {"bench", "cli"}


def room(module: str) -> str:
    """awq.kernels.cpu -> kernels"""
    return module.split(".")[1]


def imported_rooms(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            rooms |= {room(alias.name) for alias in node.names if alias.name.startswith("awq.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "awq":
            public = {alias.name: awq._HOMES.get(alias.name, f"awq.{alias.name}") for alias in node.names}
            rooms |= {room(home) for name, home in public.items() if name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("awq."):
            rooms.add(room(str(node.module)))
    return rooms


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", [file for file in FILES if file != ROOT / "__init__.py"], ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    home = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert home in ALLOWED, f"{name_of(file)} is in no known room: say here what it may import"
    wrong = imported_rooms(TREES[file]) - ALLOWED[home] - {home}
    assert not wrong, f"{name_of(file)} imports {sorted(wrong)}: {home} may import {sorted(ALLOWED[home])}"


def test_every_package_used_is_declared() -> None:
    """What is imported is a dependency or in an extra, not there by luck because another package needs it."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {canonical(re.split(r"[^\w.-]", line)[0]) for lines in groups for line in lines}
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    used = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    used |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    owners = importlib.metadata.packages_distributions()
    for package in {name.split(".")[0] for name in used} & set(owners) - {"awq"}:
        names = {canonical(owner) for owner in owners[package]}
        assert names & declared, f"{package} comes from {sorted(names)}, which pyproject.toml does not name"


def canonical(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_short(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= FILE_LINES, f"{name_of(file)} has {lines} lines"
    functions = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    # Without the signature: that of a command is a list of its options.
    lengths = {node.name: (node.end_lineno or 0) - node.body[0].lineno + 1 for node in functions}
    assert max(lengths.values(), default=0) <= FUNCTION_LINES, f"{name_of(file)}: {lengths}"


@pytest.mark.parametrize("start", ["import awq", "import runpy; sys.argv = ['awq', '--help']; run('awq')"])
def test_starts_without_heavy_imports(start: str) -> None:
    """What takes seconds to import is loaded by the first use of it."""
    program = f"""
import sys

def run(module):
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as exit:
        assert not exit.code, exit.code

{start}
print(*sorted({{"torch", "transformers", "numpy", "matplotlib", "accelerate"}} & set(sys.modules)), file=sys.stderr)
"""
    path = os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("name", awq.__all__)
def test_public_names_resolve(name: str) -> None:
    value = getattr(awq, name)
    assert name in ("__version__", getattr(value, "__name__", None))
    assert name in dir(awq)


def test_public_names_are_listed_once() -> None:
    assert sorted(awq.__all__) == sorted({*awq._HOMES, "__version__"})
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        awq.quantise  # noqa: B018


def test_an_installed_autoawq_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.9")
    monkeypatch.delitem(vars(awq), "AutoAWQForCausalLM", raising=False)
    with pytest.warns(UserWarning, match=r"autoawq 0\.2\.9 is installed too"):
        assert awq.AutoAWQForCausalLM
