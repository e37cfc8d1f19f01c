"""The `skipkv` command. Each subcommand imports its modules when it runs, so that `skipkv --help` stays fast."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import KVPolicyError
from . import plan_options, vectors

app = typer.Typer(
    help="Tools for the SkipKV plugin for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
trace_app = typer.Typer(help="Inspect the traces that --kv-trace-dir writes.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")


@app.callback()
def _root() -> None:
    # With a callback the program stays a group of commands, whatever their number.
    pass


@app.command("doctor")
def _doctor() -> None:
    """Check the installation and show which backend runs each operator; exits with 1 if there is a problem."""
    from . import doctor

    findings = doctor.examine()
    typer.echo("\n".join(findings.lines).rstrip())
    if not findings.healthy:
        raise typer.Exit(1)


app.command("plan")(plan_options.plan)

# argparse parses the options of the next three commands: they take several values after one flag, and
# `python -m benchmarks.fidelity` shares them.
_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("fidelity", context_settings=_PASSED_ON)
def _fidelity(context: typer.Context) -> None:
    """Measure how much eviction changes a model's predictions on your texts; no grading needed."""
    from ..evaluation import command

    if status := command.main("skipkv fidelity", context.args):
        raise typer.Exit(status)


@app.command("tune", context_settings=_PASSED_ON)
def _tune(context: typer.Context) -> None:
    """Find the cheapest method and budget within a given loss on your texts, and print the command to serve it."""
    from . import tune

    if status := tune.main("skipkv tune", context.args):
        raise typer.Exit(status)


@app.command("train-gates", context_settings=_PASSED_ON)
def _train_gates(context: typer.Context) -> None:
    """Train a model's gates for `trimkv` on your texts."""
    from ..training import command

    if status := command.main("skipkv train-gates", context.args):
        raise typer.Exit(status)


app.command("extract-vector")(vectors.extract_vector)
app.command("import-vector")(vectors.import_vector)


@trace_app.command("view")
def _view(
    file: Annotated[Path, typer.Argument(help="A trace: one .safetensors file from the folder of --kv-trace-dir.")],
    out: Annotated[
        Path | None, typer.Option(help="Page to write. Default: FILE with the suffix .html.", metavar="PAGE.html")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer to decode the tokens. Default: that of the trace's model.", metavar="NAME_OR_FOLDER"
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write an HTML page that shows which tokens were kept at every compaction."""
    from . import trace_view

    page = trace_view.view(file, out, tokenizer)
    for note in page.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {page.path} ({page.path.stat().st_size / 1024:.0f} KiB)")
    if open_page and not webbrowser.open(page.path.resolve().as_uri()):
        typer.echo("note: no browser could be started; open the page yourself", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `skipkv` command.

    Args:
        arguments: words after the command's name; None takes those of the process.

    Raises:
        SystemExit: always; code 0 on success, 2 after an error whose message went to stderr, or a command's own code.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="skipkv")
    except KVPolicyError as error:
        typer.echo(f"skipkv: error: {error}", err=True)
        sys.exit(2)
