import sys
import warnings
from typing import Any, NoReturn

import pytest

import awq
from awq import cli, hardware
from awq.cli import app
from awq.errors import AwqError, ModelNotFoundError
from tests.cli.run import refused, run

COMMANDS = ("quantize", "generate", "chat", "eval", "bench", "hardware", "inspect", "push", "demo")


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ()])
def test_help_lists_every_command_with_a_line_each(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:")[2].strip().splitlines()
    assert sorted(line.split()[0] for line in listed) == sorted(COMMANDS)
    assert all(len(line.split()) > 2 for line in listed)
    assert "completion" not in result.stdout


@pytest.mark.parametrize("command", [*COMMANDS, "bench model", "bench kernels"])
def test_every_command_has_help(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: awq {command} ")


def test_version() -> None:
    assert run("--version").stdout.strip() == awq.__version__


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("quantise model", "'quantise'"),
        ("quantize", "'MODEL'"),
        ("quantize model", "'--output'"),
        ("quantize model --output out --bitz 4", "--bitz"),
        ("quantize model --output out --bits four", "'--bits'"),
        ("quantize model --output out --verify maybe", "'--verify'"),
        ("eval model --window 1", "'--window'"),
        ("bench", "command"),
        ("generate model", "'--prompt'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: str, part: str) -> None:
    sentence = refused(*arguments.split())
    assert part in sentence
    assert "See `awq" in sentence


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(hardware, "detect", fail)


@pytest.mark.parametrize("error", [AwqError("no luck today."), ModelNotFoundError("no luck today.")])
def test_errors_of_the_package_are_one_sentence(monkeypatch: pytest.MonkeyPatch, error: AwqError) -> None:
    fail_with(monkeypatch, error)
    assert refused("hardware") == "error: no luck today."


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    result = run("hardware")
    assert result.exit_code == 130
    assert result.stderr == "interrupted.\n"
    assert result.stdout == ""


def test_bugs_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError):
        run("hardware")


def test_entry_point_prints_warnings_as_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn() -> list[Any]:
        warnings.warn("take care", stacklevel=1)
        return []

    monkeypatch.setattr(hardware, "detect", warn)
    monkeypatch.setattr(sys, "argv", ["awq", "hardware"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    assert exit_.value.code == 0
    assert "warning: take care\n" in capsys.readouterr().err


def test_without_standalone_mode_the_code_is_returned() -> None:
    assert app(["--version"], standalone_mode=False) == 0
    assert app(["--nonsense"], standalone_mode=False) == 2
