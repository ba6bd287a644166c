from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from ssl import SSLError
from types import SimpleNamespace
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest
from huggingface_hub import constants

from awq.data import files
from awq.data.files import read_texts
from awq.errors import CalibrationError, MissingDependencyError

TEXTS = ["first\nsample", "zweites Beispiel", "第三"]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.weird", "prose"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    assert read_texts(write(tmp_path, name, "one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_texts(tmp_path / "a.txt") == ["hello"]


@pytest.mark.parametrize("column", ["text", "content"])
def test_json_lines(tmp_path: Path, column: str) -> None:
    rows = [json.dumps({column: text, "id": 1}, ensure_ascii=False) for text in TEXTS]
    path = write(tmp_path, "a.jsonl", "\n".join([*rows[:2], "", json.dumps({column: None}), rows[2], ""]))
    assert read_texts(str(path), text_column=column) == TEXTS


def test_json_lines_hold_line_separators(tmp_path: Path) -> None:
    text = "a\u2028b"
    assert read_texts(write(tmp_path, "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))) == [text]


@pytest.mark.parametrize("records", [TEXTS, [{"text": text} for text in TEXTS]])
def test_json_list_and_json_of_lines(tmp_path: Path, records: list[Any]) -> None:
    assert read_texts(write(tmp_path, "a.json", json.dumps(records, indent=1))) == TEXTS
    assert read_texts(write(tmp_path, "b.json", "\n".join(map(json.dumps, records)))) == TEXTS


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [*TEXTS, None], "n": [1, 2, 3, 4]}), path)
    assert read_texts(path, text_column="body") == TEXTS
    with pytest.raises(CalibrationError, match="no text column 'text', its columns are 'body', 'n': name"):
        read_texts(path)
    with pytest.raises(CalibrationError, match="holds a int where text is needed"):
        read_texts(path, text_column="n")
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(CalibrationError, match="cannot be read as parquet"):
        read_texts(path)


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("datasets", "owner/texts")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, source: str) -> None:
    write(tmp_path, "a.parquet", "x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=f"pip install {module}"):
        read_texts(source)


def test_a_folder_in_order_without_hidden_and_binary_files(tmp_path: Path) -> None:
    write(tmp_path, "b.txt", "b")
    write(tmp_path, "a/z.md", "z")
    write(tmp_path, "a/rows.jsonl", '{"text": "row"}')
    write(tmp_path, ".git/config", "hidden")
    write(tmp_path, "blank.txt", " \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\xff")
    assert read_texts(tmp_path) == ["row", "z", "b"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "holds no text"),
        ("a.txt", " \n\t", "holds no text"),
        ("a.jsonl", '{"text": ""}\n{"text": " "}', "holds no text"),
        ("a.json", "[]", "holds no text"),
        ("a.jsonl", '{"text": "x"}\n{"tex', "not valid JSON at line 2"),
        ("a.json", '["x"', "not valid JSON at line 1"),
        ("a.jsonl", '{"body": "x", "id": 3}', "no text column 'text', its columns are 'body', 'id': name the one"),
        ("a.jsonl", '{"text": ["x"]}', "holds a list where text is needed"),
        ("a.txt", "nul \0 byte", "not readable as UTF-8"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as error:
        read_texts(write(tmp_path, name, text))
    assert name in str(error.value)


@pytest.mark.parametrize(
    "source", ["absent.txt", "./absent", "/no/such/folder", "~/nowhere/at/all", "two words", "typo"]
)
def test_what_can_only_be_a_path_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    sentence = r"does not exist: give a file, a folder, a hub data set as owner/name or, to calibrate, prose, code or"
    with pytest.raises(CalibrationError, match=sentence):
        read_texts(source)


@pytest.fixture
def _hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers, whatever this machine is connected to."""
    monkeypatch.setattr(files, "_hub_answers", lambda: True)


@pytest.mark.usefixtures("_hub")
def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((path, config, split))
        return iter([{"body": text} for text in ["", *TEXTS]])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_texts("owner/texts", "validation", "body") == TEXTS
    assert read_texts("owner/texts:part-1", text_column="body") == TEXTS
    assert asked == [("owner/texts", None, "validation"), ("owner/texts", "part-1", "train")]
    with pytest.raises(CalibrationError, match="owner/texts has no text column 'text'"):
        read_texts("owner/texts")


@pytest.mark.usefixtures("_hub")
def test_an_endless_hub_data_set_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": "again"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: rows()))
    assert len(read_texts("owner/texts")) == 10_000


@pytest.mark.usefixtures("_hub")
@pytest.mark.parametrize("error", [FileNotFoundError, ValueError])
def test_an_unreadable_data_set_gets_a_sentence(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise error("no such set.\nand a long trace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        CalibrationError, match=r"owner/typo is no file .* could not be read \(no such set\): give a file"
    ):
        read_texts("owner/typo")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def no_route(request: Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise URLError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "urlopen", no_route)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace())
    with pytest.raises(
        CalibrationError, match=r"^owner/texts is no file .*hub cannot be reached: check the connection, or give a file"
    ):
        read_texts("owner/texts")
    assert asked == [constants.ENDPOINT]


@pytest.mark.parametrize(
    ("error", "answers"),
    [
        (HTTPError("address", 503, "busy", Message(), None), True),
        (URLError(SSLError("unknown certificate")), True),
        (URLError("no route"), False),
        (TimeoutError(), False),
    ],
)
def test_what_counts_as_an_answer(error: Exception, answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "urlopen", fail)
    assert files._hub_answers() is answers


def test_offline_on_purpose_only_the_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it (OfflineModeIsEnabled)")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(files, "urlopen", None)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match="since HF_HUB_OFFLINE is set: unset it, or give a file"):
        read_texts("owner/texts")
