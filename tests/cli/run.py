"""Run the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from awq.cli import app


def run(*arguments: str | Path | float) -> Any:
    """The result of `awq ARGUMENTS`; what is no exit is raised, as a bug would be."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def run_json(*arguments: str | Path | float) -> Any:
    """The parsed standard output of a command that must succeed."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: str | Path | float) -> str:
    """The one sentence with which a command refuses wrong input."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith((".", "`"))
    return str(line)
