"""The shape of the house: imports go one way, nothing is too long, and `import awq` is light."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import awq

ROOT = Path(awq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
PROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
FILE_LINES, FUNCTION_LINES, MODULES = 300, 60, 10
# These hold more, and do not fall into parts: a command, a part of the decode step or a part of the kernels a file.
LARGER = {"cli": 13, "engine": 16, "kernels/cuda": 14}

GROUND = {"capability", "config", "errors", "hardware", "packing"}
# Which other rooms a room may import: every arrow of the design, none back. A file is of the smallest room around it,
# and an arrow to a room leads to all that is in it.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "packing": {"errors"},
    "capability": {"errors"},
    "hardware": {"capability", "errors"},
    "progress": set(),
    "jit": {"errors"},
    "kernels": {"jit"} | GROUND,
    "linear": {"kernels"} | GROUND,
    "engine": {"jit", "kernels", "linear"} | GROUND,
    "structure": {"config", "errors"},
    "algorithm.held": set(),
    "algorithm.ranks": set(),
    "algorithm.inputs": {"algorithm.held", "algorithm.ranks", "errors", "structure"},
    "algorithm.search": {"algorithm.inputs", "algorithm.ranks", "config", "packing", "structure"},
    "algorithm": {"algorithm.held", "algorithm.inputs", "algorithm.ranks", "algorithm.search"}
    | {"config", "packing", "structure"},
    "checkpoint": {"config", "errors", "packing"},
    "hub": {"checkpoint", "config", "errors"},
    "data": {"errors"},
    "evaluate": {"data", "errors"},
    "pretrained": {"algorithm.held", "checkpoint", "errors", "structure"},
    "processes": {"algorithm.ranks", "errors", "pretrained"},
    "storage": {"algorithm", "checkpoint", "engine", "kernels", "linear", "pretrained", "processes", "structure"}
    | {"config", "errors", "packing"},
    "pipeline": {"algorithm", "checkpoint", "data", "kernels", "linear", "pretrained", "processes", "progress"}
    | {"config", "errors", "packing", "storage", "structure"},
    "model": {"config", "data", "engine", "errors", "pipeline", "pretrained", "processes", "storage"},
    "compat": {"errors", "evaluate", "model", "packing"},
}
# The top of the house sees everything below it, and nobody below sees it.
ALLOWED["bench"] = set(ALLOWED)
ALLOWED["cli"] = set(ALLOWED)
ALLOWED["__main__"] = {"cli"}


def within(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def imported(tree: ast.AST) -> set[str]:
    """Every module or name of ours, without the `awq.` in front."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "awq":
            names |= {f"{awq._HOMES.get(alias.name, 'awq')}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("awq.") for name in names if name.startswith("awq.")} - {"__version__"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", [file for file in FILES if file != ROOT / "__init__.py"], ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    home = max((room for room in ALLOWED if within(module, room)), key=len, default=None)
    assert home, f"{name_of(file)} is in no known room: say here what it may import"
    rooms = ALLOWED[home] | {home}
    wrong = {name for name in imported(TREES[file]) if not any(within(name, room) for room in rooms)}
    assert not wrong, f"{name_of(file)} imports {sorted(wrong)}: {home} may import {sorted(ALLOWED[home])}"


def test_no_arrow_leads_back() -> None:
    TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def test_folders_are_small() -> None:
    modules = Counter(name_of(file.parent) for file in FILES if file.stem not in ("__init__", "__main__"))
    large = {folder: count for folder, count in modules.items() if count > LARGER.get(folder, MODULES)}
    assert not large, f"more than {MODULES} files: what of them belongs together?"


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
