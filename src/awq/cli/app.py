"""The `awq` command: its subcommands, and one place where errors become a sentence and an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from awq.cli.chat import chat
from awq.cli.demo import demo
from awq.cli.generate import generate
from awq.cli.hardware import hardware
from awq.cli.inspect import inspect
from awq.cli.measure import bench, evaluate
from awq.cli.output import is_first_process, say
from awq.cli.push import push
from awq.cli.quantize import quantize
from awq.errors import AwqError, EndedElsewhereError

# click's UsageError, which typer bundles in newer versions and imports in older ones.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130


class Commands(TyperGroup):
    """Wrong input is one sentence on stderr and exit code 2, Ctrl-C one line and 130; anything else is a bug."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        try:
            result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except UsageError as error:
            _say_once(f"error: {_usage_sentence(error)}")
            result = EXIT_WRONG_INPUT
        except EndedElsewhereError:
            result = EXIT_WRONG_INPUT
        except AwqError as error:
            _say_once(f"error: {' '.join(str(error).split())}", error.ended_all)
            result = EXIT_WRONG_INPUT
        code = result if isinstance(result, int) else 0
        return sys.exit(code) if standalone_mode else code

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _say_once(" ".join(["interrupted.", *map(str, interrupt.args)]))
            raise typer.Exit(EXIT_INTERRUPTED) from None


def _say_once(text: str, mine: bool = False) -> None:
    """A line that all of torchrun's processes have come to, or this one alone."""
    if mine or is_first_process():
        say(text)


def _usage_sentence(error: Any) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "awq"
    return f"{error.format_message().rstrip('.')}. See `{command} --help`."


app = typer.Typer(
    name="awq",
    cls=Commands,
    help="4-bit AWQ quantization of language models: quantize, generate, measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from awq import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(quantize)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")
app.command()(inspect)
app.command()(push)
app.command()(hardware)
app.command()(demo)


def main() -> None:
    """Run the command line; the entry point of `awq` and `python -m awq`."""
    warnings.showwarning = _show_warning
    app(prog_name="awq")


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    say(f"warning: {message}")
