"""What commands print: results on stdout, as a table or as JSON, and everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# Tables that go to a file or a pipe are not squeezed into 80 columns.
_PIPE_WIDTH = 160


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that prints results; alone, it is."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{printable(text)}\n")
    sys.stderr.flush()


def print_json(value: object) -> None:
    """One JSON document on stdout; a number that is not finite is null."""
    sys.stdout.write(to_json(value))


def to_json(value: object) -> str:
    return json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout; columns of numbers are right-aligned, and the first is never broken."""
    from rich import box
    from rich.table import Table

    cells = [[format_cell(cell) for cell in row] for row in rows]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row)
    _print(table)


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    print_table(title, ("", ""), ((name.replace("_", " "), value) for name, value in facts.items()))


def _print(table: Table) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def format_cell(value: object) -> str:
    """Three significant digits for numbers below 100, none after the point above; "-" for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:#.3g}"
    return printable(str(value))


def printable(text: str) -> str:
    """The text without what a terminal acts upon; names and settings come from files of strangers."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def format_bytes(count: int | None) -> str:
    """Megabytes or gigabytes, of 1e6 and 1e9 bytes."""
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "").replace("e-", "").lstrip("-+").isdigit()


def _plain(value: Any) -> Any:
    """`value` as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
