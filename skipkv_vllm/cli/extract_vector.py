"""`skipkv extract-vector`: read or generate reasoning texts, average states, and sweep layers for `--layer auto`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.errors import KVPolicyError
from ..core.files import check_writable
from ..steering.extraction.activations import ClassSums, measure
from ..steering.extraction.checkpoints import Checkpoint, open_checkpoint
from ..steering.extraction.grading import grade_boxed, math_verify
from ..steering.extraction.reasoning_texts import (
    Problem,
    ReasoningText,
    at_most_per_outcome,
    load_problems,
    read_texts,
    write_texts,
)
from ..steering.extraction.sweep import Cell, Outcome, cell, choose
from ..steering.extraction.thoughts import LABELS, KeywordSet, load_keywords
from ..steering.tables import split_tokens
from . import generation

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """The command's options by name.

    Attributes:
        layer: a layer; None for `auto`.
        layers: candidates of `auto`; empty for all.
        tolerance: share of right answers that `auto` may lose.
    """

    model: str
    out: Path
    layer: int | None
    traces: Path | None
    dataset: str | None
    problems: int
    skip: int
    per_outcome: int | None
    keywords: str
    min_thoughts: int
    save_traces: Path | None
    dtype: str
    device: str | None
    max_tokens: int
    temperature: float
    seed: int
    engine: Mapping[str, Any]
    dev: str | None
    dev_problems: int
    layers: tuple[int, ...]
    alpha0: tuple[float, ...]
    gamma: float
    tolerance: float

    def check(self) -> None:
        """Raise `KVPolicyError` for options that are wrong whatever the model is."""
        if (self.traces is None) == (self.dataset is None):
            raise KVPolicyError("give either texts to read (--traces FILE) or problems to solve (--dataset), not both")
        if self.layer is None and self.dev is None:
            raise KVPolicyError("--layer auto needs development problems with answers: --dev FILE_OR_NAME")
        if self.layer is None and not (self.alpha0 and all(alpha > 0 for alpha in self.alpha0)):
            raise KVPolicyError(f"--alpha0 {self.alpha0}: give strengths above 0, e.g. 0.5,1,1.5")
        if self.dtype not in DTYPES:
            raise KVPolicyError(f"--dtype {self.dtype!r} is not one of: {', '.join(DTYPES)}")
        check_writable("--out", self.out)
        if self.save_traces is not None:
            check_writable("--save-traces", self.save_traces)


def extract(options: Options, echo: Callable[[str], None]) -> None:
    """Run the command.

    Args:
        options: of the command.
        echo: prints a line.

    Raises:
        KVPolicyError: bad options, files or texts; or no setting of `auto` shortened the answers.
    """
    options.check()
    keywords = load_keywords(options.keywords)
    checkpoint = open_checkpoint(options.model)
    split_tokens(checkpoint.tokenizer)
    layers = (options.layer,) if options.layer is not None else options.layers or tuple(range(checkpoint.num_layers))
    for layer in layers:
        checkpoint.check_layer(layer)
    dev = _dev_problems(options) if options.layer is None else []

    traces = _traces(options, checkpoint, echo)
    if options.per_outcome is not None:
        traces = at_most_per_outcome(traces, options.per_outcome)
    sums = measure(checkpoint, traces, layers, keywords, dtype=options.dtype, device=options.device)
    sums.check(options.min_thoughts)
    _describe(sums, len(traces), layers, echo)

    layer = layers[0]
    if options.layer is None:
        layer = _sweep(options, checkpoint, keywords, sums, dev, echo)
    sums.vector(layer, checkpoint, keywords).save(options.out)
    echo(f"wrote {options.out}: layer {layer} of {checkpoint.num_layers}")


# ---- traces


def _traces(options: Options, checkpoint: Checkpoint, echo: Callable[[str], None]) -> list[ReasoningText]:
    if options.traces is not None:
        return read_texts(options.traces)
    assert options.dataset is not None
    problems = load_problems(options.dataset, options.skip, options.problems)
    if any(problem.answer is not None for problem in problems):
        math_verify()
    prompts = [_prompt(checkpoint, problem) for problem in problems]
    with generation.engine(options.model, options.engine) as llm:
        answers = _answer(options, llm, [generation.Job(prompt, {}) for prompt in prompts])
    traces = [
        ReasoningText(
            prompt,
            answer.text,
            None if problem.answer is None else grade_boxed(problem.answer, answer.text).correct,
        )
        for prompt, problem, answer in zip(prompts, problems, answers, strict=True)
    ]
    graded = [trace.correct for trace in traces if trace.correct is not None]
    right = f", {sum(graded)} of {len(graded)} right" if graded else ""
    length = sum(answer.length for answer in answers) / len(answers)
    echo(f"{len(traces)} texts of {length:.0f} tokens{right}, {sum(a.truncated for a in answers)} truncated")
    if options.save_traces is not None:
        write_texts(options.save_traces, traces)
    return traces


def _prompt(checkpoint: Checkpoint, problem: Problem) -> str:
    messages = [{"role": "user", "content": problem.question}]
    if checkpoint.tokenizer.chat_template is None:
        raise KVPolicyError(f"{checkpoint.name} has no chat template; give texts with --traces")
    return str(checkpoint.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _answer(options: Options, llm: Any, jobs: Sequence[generation.Job]) -> list[generation.Answer]:
    return generation.answer(llm, jobs, options.max_tokens, options.temperature, options.seed)


def _describe(sums: ClassSums, traces: int, layers: Sequence[int], echo: Callable[[str], None]) -> None:
    counts = zip(LABELS, sums.counts.sum(0).tolist(), strict=True)
    echo(f"{traces} texts, thoughts: " + ", ".join(f"{count} {label}" for label, count in counts))
    for layer in layers:
        norm, mean, cosine = sums.difference(layer).norm(), sums.mean_norm(layer), sums.split_half_cosine(layer)
        agreement = "unknown" if cosine is None else f"{cosine:.4f}"
        share = norm / mean if mean else float("nan")
        echo(f"layer {layer}: norm {norm:.4g}, {share:.3f} of the mean state's, split-half cosine {agreement}")


# ---- the sweep


def _dev_problems(options: Options) -> list[Problem]:
    math_verify()
    assert options.dev is not None
    problems = load_problems(options.dev, 0, options.dev_problems)
    if unknown := sum(problem.answer is None for problem in problems):
        raise KVPolicyError(f"--dev {options.dev}: {unknown} problems have no answer, so accuracy cannot be measured")
    return problems


def _sweep(
    options: Options,
    checkpoint: Checkpoint,
    keywords: KeywordSet,
    sums: ClassSums,
    dev: Sequence[Problem],
    echo: Callable[[str], None],
) -> int:
    """Try every layer and strength in one engine, write the results, and return the best layer."""
    # The input of the first layer is usually the embedding of the same token everywhere: no difference to steer by.
    layers = [layer for layer in sums.layers if sums.difference(layer).float().any()]
    with tempfile.TemporaryDirectory() as folder:
        files = {f"layer-{layer}": str(Path(folder, f"{layer}.safetensors")) for layer in layers}
        for layer, file in zip(layers, files.values(), strict=True):
            sums.vector(layer, checkpoint, keywords).save(file)
        grid: list[tuple[int | None, float]] = [(None, 0.0), *((la, al) for la in layers for al in options.alpha0)]
        jobs = [
            generation.Job(_prompt(checkpoint, problem), _steered(layer, alpha0, options.gamma))
            for layer, alpha0 in grid
            for problem in dev
        ]
        with generation.engine(options.model, options.engine, files) as llm:
            answers = iter(_answer(options, llm, jobs))
    cells = [cell(layer, alpha0, [_outcome(problem, next(answers)) for problem in dev]) for layer, alpha0 in grid]
    for each in cells:
        where = "not steered" if each.layer is None else f"layer {each.layer}, alpha0 {each.alpha0:g}"
        echo(f"{where}: {each.mean_length:.0f} tokens, {each.accuracy:.1%} right, {each.truncated:.1%} truncated")
    plain, steered = cells[0], cells[1:]
    _write_sweep(options, cells, echo)
    best = choose(plain, steered, options.tolerance)
    assert best.layer is not None
    echo(
        f"best: layer {best.layer} with alpha0 {best.alpha0:g}: {best.mean_length:.0f} tokens instead of "
        f"{plain.mean_length:.0f}, {best.accuracy:.1%} right instead of {plain.accuracy:.1%}"
    )
    return best.layer


def _write_sweep(options: Options, cells: Sequence[Cell], echo: Callable[[str], None]) -> None:
    """Write the cells of a sweep, the first one unsteered, and their plot beside the vector."""
    from .sweep_plot import plot

    figures = options.out.with_suffix(".sweep.json")
    settings = json.dumps(asdict(options) | {"version": __version__}, default=str)
    rows = ",\n  ".join(json.dumps(each._asdict()) for each in cells)
    figures.write_text(f'{{\n "settings": {settings},\n "cells": [\n  {rows}\n ]\n}}\n')
    picture = plot(cells[0], cells[1:], options.out.with_suffix(".sweep.svg"))
    echo(f"wrote {figures} and {picture}")


def _steered(layer: int | None, alpha0: float, gamma: float) -> dict[str, Any]:
    if layer is None:
        return {}
    return {"steering": f"layer-{layer}", "steering_alpha0": alpha0, "steering_gamma": gamma}


def _outcome(problem: Problem, answer: generation.Answer) -> Outcome:
    assert problem.answer is not None
    return Outcome(grade_boxed(problem.answer, answer.text).correct, answer.length, answer.truncated)
