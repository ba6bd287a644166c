"""The command line: parse, call one function, print. Importing it loads neither torch nor transformers."""

from awq.cli.app import app, main

__all__ = ["app", "main"]
