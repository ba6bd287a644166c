"""Rows as CSV and JSON, on the screen, and as tables in the documentation."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from awq.config import EFFORTS

Row = dict[str, Any]
# What makes two rows the same measurement.
IDENTITY = ("section", "model", "name", "calibration", "bits", "group_size", "samples", "seq_len", "windows")
FIGURES = ("_ppl", "_dln_x100", "_dln_se_x100", "_kl_x1000", "_kl_se_x1000", "_top1")
BEGIN, END = "<!-- ablation: begin -->", "<!-- ablation: end -->"
SECTIONS = {
    "steps": "Each step, 4 bits in groups of 64",
    "fp16 channels": "Plain rounding with some channels left in fp16",
    "bits and groups": "Bits and groups",
    "calibration text": "Calibration text",
    "off the grid": "A rescaled copy that computes the same",
}
# Sections that vary one setting of the steps' rows open with rounding and each effort as they are there.
OF_STEPS = ("bits and groups", "calibration text")


def identity(row: Row) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in IDENTITY)


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _read(name, value) for name, value in row.items()} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """`path`, a .csv, and the same as .json beside it; written aside and moved, so that a stop loses no row."""
    aside = path.with_suffix(".part")
    with aside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: _stored(value) for name, value in row.items()} for row in rows)
    aside.replace(path)
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(column: str, value: str) -> Any:
    if column in ("bits", "group_size", "samples", "seq_len"):
        return int(value)
    return float(value) if column == "seconds" or column.endswith(FIGURES) else value


def _stored(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def show(rows: Sequence[Row]) -> None:
    """All sections on the screen."""
    for section, part in sections(rows):
        table = Table(title=section, title_justify="left", box=SIMPLE_HEAD)
        header, *lines = cells(part)
        for index, column in enumerate(header):
            table.add_column(column, justify="right" if index > 1 else "left")
        for line in lines:
            table.add_row(*line)
        Console(width=None if Console().is_terminal else 160, markup=False, highlight=False).print(table)


def markdown(rows: Sequence[Row]) -> str:
    """All sections as markdown tables."""
    parts = []
    for section, part in sections(rows):
        header, *lines = cells(part)
        rule = ["---"] * len(header)
        parts += [f"### {section}", "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))]
    return "\n\n".join(parts)


def insert(document: Path, text: str) -> None:
    """Put `text` between the two marks in `document`."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{document} has no line {BEGIN!r} and, after it, {END!r}: add them where the tables belong.")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def sections(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The sections that have rows, in order, with their titles."""
    steps = [row for row in rows if row["section"] == "steps"]
    common = [row for row in steps if row["name"].rpartition(": ")[2] in ("rounding", *EFFORTS)]
    titles = SECTIONS | {row["section"]: row["section"] for row in rows if row["section"] not in SECTIONS}
    found = {name: [row for row in rows if row["section"] == name] for name in titles}
    return [
        (title, [*(common if name in OF_STEPS else ()), *found[name]]) for name, title in titles.items() if found[name]
    ]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A header and a line for each row; what does not change within a section is left out."""
    texts = [column.removesuffix("_ppl") for column in rows[0] if column.endswith("_ppl")]
    varied = [name for name in ("bits", "group_size", "calibration") if len({str(row[name]) for row in rows}) > 1]
    header = [
        *("", *(name.replace("_", " ") for name in varied)),
        *(f"{text} {figure}" for text in texts for figure in ("ppl", "Δ ln ppl x100", "KL x1000")),
    ]
    return [
        header,
        *([str(row["name"]), *(_label(row[name]) for name in varied), *_figures(row, texts)] for row in rows),
    ]


def _label(value: Any) -> str:
    return {"-1": "a row", "0": "", "none": ""}.get(str(value), str(value))


def _figures(row: Row, texts: Sequence[str]) -> list[str]:
    figures = []
    for text in texts:
        number = {figure: float(row[f"{text}_{figure}"]) for figure in ("ppl", "dln_x100", "dln_se_x100", "kl_x1000")}
        error = f" ± {number['dln_se_x100']:.2f}"
        figures += [f"{number['ppl']:.2f}", f"{number['dln_x100']:.2f}{error}", f"{number['kl_x1000']:.1f}"]
    return figures
