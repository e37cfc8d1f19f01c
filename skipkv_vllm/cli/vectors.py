"""Command lines of `skipkv extract-vector` and `skipkv import-vector`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..core.errors import KVPolicyError

N = TypeVar("N", int, float)

Model = Annotated[str, typer.Option(help="Checkpoint: a folder, or a name on the hub.", metavar="NAME_OR_FOLDER")]
Out = Annotated[Path, typer.Option(help="Vector file to write.", metavar="FILE.safetensors")]


def extract_vector(
    model: Model,
    out: Out,
    layer: Annotated[
        str, typer.Option(help='Decoder layer whose input is steered, from 0; "auto" tries them.', metavar="L|auto")
    ],
    traces: Annotated[
        Path | None, typer.Option(help='Traces to read: JSON lines with "prompt", "response", "correct".')
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help='Problems to solve instead: math-train, gsm8k-train, or JSON lines with "question", "answer".',
            metavar="NAME|FILE",
        ),
    ] = None,
    problems: Annotated[int, typer.Option(min=1, help="How many problems of the data set.")] = 1000,
    skip: Annotated[int, typer.Option(min=0, help="Leave out its first problems.")] = 0,
    per_outcome: Annotated[
        int | None, typer.Option(min=1, help="At most so many right and so many wrong traces; SEAL takes 500.")
    ] = None,
    keywords: Annotated[
        str, typer.Option(help="What tells thoughts apart: seal, skipkv, or a JSON file of regular expressions.")
    ] = "seal",
    min_thoughts: Annotated[int, typer.Option(min=1, help="Fewest thoughts on each side of the difference.")] = 50,
    save_traces: Annotated[Path | None, typer.Option(help="Keep the generated traces in this file.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model when its states are read.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Where they are read. Default: a GPU if there is one.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Generated at most, per answer.")] = 10_000,
    temperature: Annotated[float, typer.Option(min=0, help="Of generated answers; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    engine: Annotated[
        str, typer.Option(help='Arguments of vllm.LLM, e.g. {"tensor_parallel_size": 2}.', metavar="JSON")
    ] = "{}",
    dev: Annotated[
        str | None, typer.Option(help="auto: development problems with answers, as for --dataset.", metavar="NAME|FILE")
    ] = None,
    dev_problems: Annotated[int, typer.Option(min=1, help="auto: how many of them.")] = 100,
    layers: Annotated[str, typer.Option(help="auto: layers to try, e.g. 16,20,24. Default: all.")] = "",
    alpha0: Annotated[str, typer.Option(help="auto: strengths to try.")] = "0.5,0.75,1,1.25,1.5",
    gamma: Annotated[float, typer.Option(help="auto: what each non-execution thought adds to the strength.")] = 0.0,
    tolerance: Annotated[
        float, typer.Option(min=0, max=1, help="auto: share of right answers that may be lost.")
    ] = 0.01,
) -> None:
    """Make a steering vector: mean state before execution thoughts minus mean state before all others."""
    from ..config import parse_json_object
    from . import extract_vector as command

    options = command.Options(
        model=model,
        out=out,
        layer=None if layer == command.AUTO else _layer(layer),
        traces=traces,
        dataset=dataset,
        problems=problems,
        skip=skip,
        per_outcome=per_outcome,
        keywords=keywords,
        min_thoughts=min_thoughts,
        save_traces=save_traces,
        dtype=dtype,
        device=device,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        engine=parse_json_object("--engine", engine),
        dev=dev,
        dev_problems=dev_problems,
        layers=tuple(_numbers("--layers", layers, int)) if layers else (),
        alpha0=tuple(_numbers("--alpha0", alpha0, float)),
        gamma=gamma,
        tolerance=tolerance,
    )
    command.extract(options, typer.echo)


def import_vector(
    file: Annotated[Path, typer.Argument(help="A .pt file of SEAL or SkipKV, or a GGUF control vector.")],
    model: Model,
    out: Out,
    layer: Annotated[
        int | None, typer.Option(help="Decoder layer whose input is steered, where the file does not say it.")
    ] = None,
    sign: Annotated[
        str | None,
        typer.Option(
            help="Which way the file's vector points. Default: RT-E for .pt, E-RT for GGUF.", metavar="E-RT|RT-E"
        ),
    ] = None,
) -> None:
    """Turn another project's steering vector into a file for --kv-steering-vectors."""
    from ..steering.extraction import imports
    from ..steering.extraction.checkpoints import open_checkpoint

    if sign not in (None, "E-RT", "RT-E"):
        raise KVPolicyError(f"--sign {sign!r} is neither E-RT (execution minus the rest) nor RT-E (the opposite)")
    vector = imports.import_vector(file, open_checkpoint(model), layer, sign)  # type: ignore[arg-type]
    vector.save(out)
    typer.echo(f"wrote {out}: layer {vector.layer} of {vector.num_layers}, norm {vector.norm:.4g}; {vector.method}")


def _layer(text: str) -> int:
    numbers = _numbers("--layer", text, int)
    if len(numbers) > 1:
        raise KVPolicyError(f"--layer {text!r} names several layers; name one, or --layer auto --layers {text}")
    return numbers[0]


def _numbers(flag: str, text: str, kind: type[N]) -> list[N]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "16,20,24" if kind is int else "0.5,1,1.5"
        auto = ' or "auto"' if flag == "--layer" else ""
        raise KVPolicyError(f"{flag} {text!r} is not made of {kind.__name__} numbers{auto}, e.g. {example}") from None
