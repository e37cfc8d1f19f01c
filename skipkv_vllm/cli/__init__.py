"""The `skipkv` command. A command imports what it needs when it runs, so that `skipkv --help` stays quick."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import KVPolicyError
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


@app.command("plan")
def _plan(
    model: Annotated[str, typer.Option(help="Folder with a config.json, or name on the hub.", metavar="MODEL")],
    gpu_memory: Annotated[float | None, typer.Option(help="Memory of one GPU.", metavar="GIB")] = None,
    kv_policy: Annotated[str, typer.Option(help="Eviction method.", metavar="NAME")] = "skipkv",
    kv_budget: Annotated[int, typer.Option(help="Tokens a request is compacted to.", metavar="N")] = 1024,
    kv_buffer: Annotated[int, typer.Option(help="Tokens it may grow beyond that.", metavar="N")] = 128,
    kv_window: Annotated[int, typer.Option(help="Newest tokens that always survive.", metavar="N")] = 8,
    kv_granularity: Annotated[str, typer.Option(help="What leaves together.", metavar="head|sentence")] = "head",
    kv_protect_prompt: Annotated[bool, typer.Option(help="Never evict the prompt.")] = True,
    kv_policy_config: Annotated[str, typer.Option(help="Parameters of the method.", metavar="JSON")] = "{}",
    length: Annotated[
        int | None, typer.Option(help="Prompt and output of a request. Default: the longest.", metavar="N")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Of that, the prompt.", metavar="N")] = 0,
    max_model_len: Annotated[int | None, typer.Option(help="Default: the model's.", metavar="N")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Requests at once. Default: vLLM's.", metavar="N")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Default: vLLM's.", metavar="N")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a page.", metavar="N")] = 16,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share a layer.", metavar="N")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(help="Stages that share the layers.", metavar="N")] = 1,
    dtype: Annotated[str, typer.Option(help="Of weights and KV: auto, bfloat16, float16, float32.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="Of KV: auto (as the weights), fp8, fp8_e5m2, ...")] = "auto",
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share that vLLM may use.", metavar="SHARE")] = 0.92,
    weight_memory: Annotated[
        float | None, typer.Option(help="All ranks together. Default: parameters x element size.", metavar="GIB")
    ] = None,
    activation_memory: Annotated[
        float | None, typer.Option(help="Of one rank. Default: an estimate.", metavar="GIB")
    ] = None,
    overhead_memory: Annotated[
        float, typer.Option(help="CUDA's context, communication buffers and graphs of one rank.", metavar="GIB")
    ] = 1.0,
    kv_memory: Annotated[
        float | None,
        typer.Option(help="Memory for KV and the policy of one rank, instead of working it out.", metavar="GIB"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how many requests fit on a GPU with and without a policy; reads a model's configuration, starts nothing."""
    from ..config import KVPolicyConfig, parse_json_object
    from .plan import Machine, plan

    config = KVPolicyConfig.parse(
        {
            "kv_policy": kv_policy,
            "kv_budget": kv_budget,
            "kv_buffer": kv_buffer,
            "kv_window": kv_window,
            "kv_granularity": kv_granularity,
            "kv_protect_prompt": kv_protect_prompt,
            "kv_policy_config": parse_json_object("--kv-policy-config", kv_policy_config),
        }
    )
    machine = Machine(
        gpu_memory=gpu_memory,
        utilization=gpu_memory_utilization,
        ranks=tensor_parallel_size,
        stages=pipeline_parallel_size,
        dtype=dtype,
        kv_dtype=kv_cache_dtype,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_tokens=max_num_batched_tokens,
        weights=weight_memory,
        activations=activation_memory,
        overhead=overhead_memory,
        kv_memory=kv_memory,
    )
    found = plan(model, config, machine, length=length, prompt=prompt)
    typer.echo(found.json() if as_json else "\n".join(found.lines()))


# The options of these are argparse's: several files and numbers after one flag, shared with
# `python -m benchmarks.fidelity`.
_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("fidelity", context_settings=_PASSED_ON)
def _fidelity(context: typer.Context) -> None:
    """Say what eviction costs on given texts: excess log loss against full KV, without grading answers."""
    from ..evaluation import command

    if status := command.main("skipkv fidelity", context.args):
        raise typer.Exit(status)


@app.command("tune", context_settings=_PASSED_ON)
def _tune(context: typer.Context) -> None:
    """Choose the cheapest method and budget that stay within a given excess on given texts, and say how to serve it."""
    from . import tune

    if status := tune.main("skipkv tune", context.args):
        raise typer.Exit(status)


@app.command("train-gates", context_settings=_PASSED_ON)
def _train_gates(context: typer.Context) -> None:
    """Train the gates that `trimkv` reads for a model, on given texts."""
    from ..training import command

    if status := command.main("skipkv train-gates", context.args):
        raise typer.Exit(status)


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
