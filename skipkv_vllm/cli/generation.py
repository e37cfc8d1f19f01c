"""Answers from vLLM, for the commands that need a model to think."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import vllm


class Job(NamedTuple):
    """A prompt's text, with its special tokens, and the request's options."""

    prompt: str
    options: Mapping[str, Any]


class Answer(NamedTuple):
    """What came out: text, tokens, and whether it was cut off."""

    text: str
    length: int
    truncated: bool


@contextlib.contextmanager
def engine(model: str, arguments: Mapping[str, Any], vectors: Mapping[str, str] | None = None) -> Iterator[vllm.LLM]:
    """An engine that is gone, with its memory, after the block.

    Args:
        model: checkpoint.
        arguments: of `vllm.LLM`.
        vectors: name -> file of the steering vectors that requests may name.
    """
    from .. import LLM

    own = {"kv_steering_vectors": dict(vectors)} if vectors else {}
    llm = LLM(model, **{"disable_log_stats": True, **arguments, **own})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def answer(llm: vllm.LLM, jobs: Sequence[Job], max_tokens: int, temperature: float, seed: int) -> list[Answer]:
    """One answer per job, in their order.

    Args:
        llm: an engine.
        jobs: what to answer.
        max_tokens: generated at most, each.
        temperature: 0 is greedy.
        seed: of sampling.
    """
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer.encode(job.prompt, add_special_tokens=False)} for job in jobs]
    params = [
        SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + number if temperature else None,
            extra_args=dict(job.options) or None,
        )
        for number, job in enumerate(jobs)
    ]
    outputs = llm.generate(prompts, params)
    return [
        Answer(o.outputs[0].text, len(o.outputs[0].token_ids), o.outputs[0].finish_reason == "length") for o in outputs
    ]
