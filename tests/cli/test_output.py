import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from awq.cli.output import format_bytes, format_cell, print_table, to_json


@dataclass(frozen=True)
class Point:
    x: float
    where: Path


def test_json_of_what_commands_return() -> None:
    value = {"points": (Point(math.nan, Path("a")), Point(1.5, Path("b"))), 8: math.inf, "µ": None}
    assert json.loads(to_json(value)) == {
        "points": [{"x": None, "where": "a"}, {"x": 1.5, "where": "b"}],
        "8": None,
        "µ": None,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (12345.6, "12,346"),
        (99.96, "100."),
        (12.345, "12.3"),
        (3.0, "3.00"),
        (0.00012345, "0.000123"),
        (True, "True"),
        (7, "7"),
        ("x", "x"),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert format_cell(value) == text


@pytest.mark.parametrize(("count", "text"), [(None, "-"), (112_300_000, "112.3 MB"), (4_350_000_000, "4.35 GB")])
def test_bytes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_names_with_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ("name", "value"), [("a[b]", 1.0), (":smile:", 2.0)])
    shown = capsys.readouterr().out
    assert "a[b]" in shown
    assert ":smile:" in shown


def test_a_pipe_gets_wide_tables(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.10." + "x" * 100
    print_table("title", ("name", "value"), [(name, 1.0)])
    assert name in capsys.readouterr().out
