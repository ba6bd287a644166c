"""`awq push`: a finished checkpoint to the hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from awq.cli import options
from awq.cli.output import format_bytes, print_facts, print_json, print_table, printable, say

if TYPE_CHECKING:
    from awq.hub import Upload


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where on the hub: owner/name.")],
    private: options.Private = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the float model, for the model card.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the model card and the files; send nothing.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Upload a checkpoint to the hub, with a model card."""
    from awq import hub

    upload = hub.prepare(folder, repo, base_model)
    for name in upload.left_out:
        say(f"warning: {name} is not uploaded: only weights, settings and texts are.")
    url = None if dry_run else hub.push(upload, private)
    if as_json:
        files = {name: path.stat().st_size for name, path in upload.files.items()}
        print_json({"repo": repo, "url": url, "bytes": upload.bytes, "files": files, "card": upload.card})
    elif dry_run:
        _show(upload)
    else:
        print_facts("Uploaded", {"address": url, "size": format_bytes(upload.bytes), "files": len(upload.files) + 1})


def _show(upload: Upload) -> None:
    sizes = ((name, format_bytes(path.stat().st_size)) for name, path in upload.files.items())
    typer.echo(printable(upload.card))
    print_table("Files beside it", ("file", "size"), sizes)
    say(f"{format_bytes(upload.bytes)} for {upload.repo}; nothing was sent.")
