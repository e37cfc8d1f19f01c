"""Generate answers with vLLM, for the commands that need a model's reasoning."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..integration.llm import LLM


class Job(NamedTuple):
    """A prompt's text including its special tokens, and the request's options."""

    prompt: str
    options: Mapping[str, Any]


class Answer(NamedTuple):
    """An answer: its text, its number of tokens, and whether it was truncated."""

    text: str
    length: int
    truncated: bool


@contextlib.contextmanager
def engine(model: str, arguments: Mapping[str, Any], vectors: Mapping[str, str] | None = None) -> Iterator[LLM]:
    """Run an engine for the duration of the block, and release its memory afterwards.

    Args:
        model: checkpoint.
        arguments: of `vllm.LLM`.
        vectors: name -> file of the steering vectors that requests may use.
    """
    from ..integration.llm import LLM

    own = {"kv_steering_vectors": dict(vectors)} if vectors else {}
    llm = LLM(model, **{"disable_log_stats": True, **arguments, **own})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answer(llm: LLM, jobs: Sequence[Job], max_tokens: int, temperature: float, seed: int) -> list[Answer]:
    """Return one answer per job, in order.

    Args:
        llm: the engine.
        jobs: prompts to answer.
        max_tokens: most tokens per answer.
        temperature: 0 is greedy.
        seed: of sampling.
    """
    from ..integration.llm import sampling_params

    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer.encode(job.prompt, add_special_tokens=False)} for job in jobs]
    params = [
        sampling_params(
            job.options,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + number if temperature else None,
        )
        for number, job in enumerate(jobs)
    ]
    outputs = llm.generate(prompts, params)
    return [
        Answer(o.outputs[0].text, len(o.outputs[0].token_ids), o.outputs[0].finish_reason == "length") for o in outputs
    ]
