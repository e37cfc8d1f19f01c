"""The `skipkv` command. A command imports what it needs when it runs, so that `skipkv --help` stays quick."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import KVPolicyError
from . import vectors

app = typer.Typer(
    help="Tools around the SkipKV plugin for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(help="Look at the traces that --kv-trace-dir leaves.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
app.command("extract-vector")(vectors.extract_vector)
app.command("import-vector")(vectors.import_vector)


@app.callback()
def _root() -> None:
    # With a callback the program stays a group of commands, whatever their number.
    pass


@app.command("doctor")
def _doctor() -> None:
    """Say what is installed and what runs each operator; exits with 1 if something needs attention."""
    from . import doctor

    findings = doctor.examine()
    typer.echo("\n".join(findings.lines).rstrip())
    if not findings.healthy:
        raise typer.Exit(1)


@trace_app.command("view")
def _view(
    file: Annotated[Path, typer.Argument(help="A trace: one .safetensors file of the folder of --kv-trace-dir.")],
    out: Annotated[
        Path | None, typer.Option(help="Page to write. Default: FILE with the ending .html.", metavar="PAGE.html")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer that gives tokens their text. Default: the trace's.", metavar="NAME_OR_FOLDER"),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in a browser.")] = False,
) -> None:
    """Write a page that shows which tokens were held after every compaction."""
    from . import trace_view

    page = trace_view.view(file, out, tokenizer)
    for note in page.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {page.path} ({page.path.stat().st_size / 1024:.0f} KiB)")
    if open_page and not webbrowser.open(page.path.resolve().as_uri()):
        typer.echo("note: no browser could be started; open the page by hand", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `skipkv` command.

    Args:
        arguments: words after the command's name; None takes those the process was started with.

    Raises:
        SystemExit: always; code 0, or 2 after an error whose message went to stderr.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="skipkv")
    except KVPolicyError as error:
        typer.echo(f"skipkv: error: {error}", err=True)
        sys.exit(2)
