import csv
import io
import json
import subprocess
from pathlib import Path

import pytest
import torch

from awq.bench import report


def test_machine_facts_say_what_a_figure_depends_on() -> None:
    facts = report.machine_facts(torch.device("cpu"))
    assert facts["device_type"] == "cpu"
    assert facts["cpu"] in facts["device"]
    assert str(facts["torch"]) == str(torch.__version__)
    assert {"commit", "awq", "transformers", "python", "cuda", "cpu_threads"} < facts.keys()
    json.dumps(facts)


def test_commit_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "src" / "awq" / "bench" / "report.py"
    home.parent.mkdir(parents=True)
    monkeypatch.setattr(report, "__file__", str(home))
    assert report.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = report.commit()
    assert clean
    assert set(clean) <= set("0123456789abcdef")


def test_an_installed_package_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its environment may lie inside somebody else's checkout."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(report, "__file__", str(tmp_path / "venv" / "lib" / "site-packages" / "awq" / "bench" / "r.py"))
    assert report.commit() is None


def test_csv_has_a_header_and_a_line_a_row() -> None:
    rows = [{"shape": "8x8", "us": 1.5}, {"shape": "a,b", "us": 2.0}]
    assert [dict(row) for row in csv.DictReader(io.StringIO(report.to_csv(rows)))] == [
        {"shape": "8x8", "us": "1.5"},
        {"shape": "a,b", "us": "2.0"},
    ]
    assert report.to_csv([]).strip() == ""
