"""Command lines of `skipkv extract-vector` and `skipkv import-vector`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from ..core.errors import KVPolicyError

N = TypeVar("N", int, float)

Model = Annotated[
    str, typer.Option(help="Checkpoint: a folder, or a name on the Hugging Face hub.", metavar="NAME_OR_FOLDER")
]
Out = Annotated[Path, typer.Option(help="Vector file to write.", metavar="FILE.safetensors")]
Layer = Annotated[
    str, typer.Option(help='Decoder layer whose input to steer, from 0; "auto" tries several.', metavar="L|auto")
]
Traces = Annotated[Path | None, typer.Option(help='Reasoning texts: JSON lines with "prompt", "response", "correct".')]
Dataset = Annotated[
    str | None,
    typer.Option(
        help='Problems to generate texts from instead: math-train, gsm8k-train, or JSON lines with "question", '
        '"answer".',
        metavar="NAME|FILE",
    ),
]
Problems = Annotated[int, typer.Option(min=1, help="Number of problems to use from --dataset.")]
Skip = Annotated[int, typer.Option(min=0, help="Number of problems to skip at the beginning of --dataset.")]
PerOutcome = Annotated[
    int | None,
    typer.Option(min=1, help="Most texts to use with a right answer, and as many with a wrong one; SEAL uses 500."),
]
Keywords = Annotated[
    str, typer.Option(help="Rules to classify thoughts: seal, skipkv, or a JSON file of regular expressions.")
]
MinThoughts = Annotated[int, typer.Option(min=1, help="Fewest thoughts allowed on each side of the difference.")]
SaveTraces = Annotated[Path | None, typer.Option(help="Save the generated texts in this file.")]
Dtype = Annotated[str, typer.Option(help="Data type of the model while its states are read.")]
Device = Annotated[str | None, typer.Option(help="Device to read states on. Default: a GPU if available.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate per answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature of generated answers; 0 is greedy.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Engine = Annotated[str, typer.Option(help='Arguments of vllm.LLM, e.g. {"tensor_parallel_size": 2}.', metavar="JSON")]
Dev = Annotated[
    str | None,
    typer.Option(help="auto: development problems with answers, in a form of --dataset.", metavar="NAME|FILE"),
]
DevProblems = Annotated[int, typer.Option(min=1, help="auto: number of problems to use from --dev.")]
Layers = Annotated[str, typer.Option(help="auto: layers to try, e.g. 16,20,24. Default: all.")]
Alpha0 = Annotated[str, typer.Option(help="auto: strengths to try.")]
Gamma = Annotated[float, typer.Option(help="auto: strength added per non-execution thought.")]
Tolerance = Annotated[
    float, typer.Option(min=0, max=1, help="auto: largest share of right answers that steering may lose.")
]


def extract_vector(
    model: Model,
    out: Out,
    layer: Layer,
    traces: Traces = None,
    dataset: Dataset = None,
    problems: Problems = 1000,
    skip: Skip = 0,
    per_outcome: PerOutcome = None,
    keywords: Keywords = "seal",
    min_thoughts: MinThoughts = 50,
    save_traces: SaveTraces = None,
    dtype: Dtype = "float32",
    device: Device = None,
    max_tokens: MaxTokens = 10_000,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    engine: Engine = "{}",
    dev: Dev = None,
    dev_problems: DevProblems = 100,
    layers: Layers = "",
    alpha0: Alpha0 = "0.5,0.75,1,1.25,1.5",
    gamma: Gamma = 0.0,
    tolerance: Tolerance = 0.01,
) -> None:
    """Make a steering vector: the mean state before execution thoughts minus the mean state before all others."""
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
        int | None, typer.Option(help="Decoder layer whose input to steer, if the file does not name it.")
    ] = None,
    sign: Annotated[
        str | None,
        typer.Option(help="Direction of the file's vector. Default: RT-E for .pt, E-RT for GGUF.", metavar="E-RT|RT-E"),
    ] = None,
) -> None:
    """Convert another project's steering vector into a file for --kv-steering-vectors."""
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
        raise KVPolicyError(f"--layer {text!r} names several layers; name one, or use --layer auto --layers {text}")
    return numbers[0]


def _numbers(flag: str, text: str, kind: type[N]) -> list[N]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        wanted, example = ("integers", "16,20,24") if kind is int else ("numbers", "0.5,1,1.5")
        auto = ' or "auto"' if flag == "--layer" else ""
        raise KVPolicyError(f"{flag} {text!r} must be {wanted} separated by commas{auto}, e.g. {example}") from None
