import csv
import io
import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from awq.bench import report
from awq.bench.kernels.shapes import Setting, Shape
from awq.bench.results import DENSE, Ceiling, KernelBench, row_of
from awq.bench.timing import Timing
from awq.errors import ConfigError


def test_machine_facts_say_what_a_figure_depends_on() -> None:
    facts = report.machine_facts(torch.device("cpu"))
    assert facts["device_type"] == "cpu"
    assert facts["cpu"] in facts["device"]
    assert str(facts["torch"]) == str(torch.__version__)
    assert {"commit", "awq", "transformers", "python", "cuda", "cpu_threads"} < facts.keys()
    json.dumps(facts)


def test_commit_of_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWQ_COMMIT", raising=False)
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
    monkeypatch.delenv("AWQ_COMMIT", raising=False)
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


def found(error: float | None = 2e-4) -> KernelBench:
    setting = Setting(Shape(4096, 11008), 128, torch.float16, outlier_ratio=0.01)
    timing = Timing(7.25e-6, 7.2e-6, 7.3e-6, 12)
    own = row_of(setting, 1, "GEMV", "awq_gemv", timing, pdl=True, error=error, dense_us=27.8)
    dense = row_of(setting, 1, DENSE, "cublas_fp16", timing)
    return KernelBench([dense, own], {}, Ceiling(4500.26, 4499))


MACHINE = {"device": "NVIDIA H200", "device_type": "cuda", "driver": "580.1", "torch": "2.11.0", "commit": None}


def test_kernel_rows_of_a_gpu_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "kernels.csv"
    report.write_kernels(file, found(), MACHINE)
    report.write_kernels(file, found(error=float("nan")), MACHINE)
    header, first, second = file.read_text().splitlines()
    assert header == (
        "gpu,driver,torch,commit,date,kernel,N,K,rows,group,dtype,zero_point,outlier_ratio,pdl,"
        "us_p50,us_p10,us_p90,rel_error,ceiling_gbs,cublas_us"
    )
    date = datetime.now(UTC).date().isoformat()
    assert first == (
        f"NVIDIA H200,580.1,2.11.0,unknown,{date},awq_gemv,4096,11008,1,128,fp16,1,0.01,1,"
        "7.250,7.200,7.300,2.000e-04,4500.3,27.800"
    )
    assert second.split(",")[17] == "nan"
    assert report.kernels_file(file, torch.device("cuda")) == file


def test_kernel_rows_of_a_cpu_have_every_field_and_replace_the_file(tmp_path: Path) -> None:
    file = tmp_path / "kernels.csv"
    for _ in range(2):
        report.write_kernels(file, found(), report.machine_facts(torch.device("cpu")))
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["version"] for row in rows] == ["dense", "GEMV"]
    assert {"median_us", "device", "commit"} <= rows[0].keys()


def test_a_folder_gets_a_file_for_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert report.kernels_file(tmp_path, torch.device("cuda")) == tmp_path / "kernels-geforce-rtx-4090.csv"


def test_files_that_cannot_take_rows(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="other columns"):
        report.kernels_file(other, torch.device("cuda"))
    assert report.kernels_file(other, torch.device("cpu")) == other
    with pytest.raises(ConfigError, match="does not exist"):
        report.kernels_file(tmp_path / "absent" / "rows.csv", torch.device("cpu"))
    picture = tmp_path / "picture.csv"
    picture.write_bytes(b"\x89PNG")
    with pytest.raises(ConfigError, match="other columns"):
        report.kernels_file(picture, torch.device("cuda"))


def test_a_checked_file_is_not_made(tmp_path: Path) -> None:
    """A measurement that ends early leaves no empty file."""
    assert not report.kernels_file(tmp_path / "rows.csv", torch.device("cpu")).exists()


def test_the_commit_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_COMMIT", "abc123")
    assert report.commit() == "abc123"
