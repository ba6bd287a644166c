import io
import sys

import pytest

from awq.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def advance(total: int, *, enabled: bool = True) -> None:
    with track("Quantizing", total, enabled=enabled) as bar:
        for index in range(total):
            bar.advance(note=f"layer {index}")


def test_a_line_every_tenth_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    advance(200)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 10
    assert lines[0].startswith("Quantizing: 20/200 layer 19, 0 s, about 0 s left")
    assert lines[-1].startswith("Quantizing: 200/200 layer 199, ")


@pytest.mark.parametrize("total", [1, 2, 3, 9])
def test_few_steps_are_a_line_each(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    advance(total)
    assert len(capsys.readouterr().err.splitlines()) == total


def test_a_step_may_count_for_several(capsys: pytest.CaptureFixture[str]) -> None:
    with track("Timing", 10) as bar:
        bar.advance(7)
        bar.advance(3)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["Timing: 7/10", "Timing: 10/10"]


def test_nothing_where_it_is_not_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    advance(5, enabled=False)
    assert capsys.readouterr() == ("", "")


def test_a_task_without_steps_is_no_error() -> None:
    advance(0)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    advance(4)
    assert "Quantizing" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert "layer 3" in terminal.getvalue()
