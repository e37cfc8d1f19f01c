"""Requests that arrive one after the other, with a look at the scheduler after every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tests.harness.process import scheduler_of

if TYPE_CHECKING:
    import vllm
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest


class Sample(NamedTuple):
    """One running request after one step, as the scheduler sees it.

    Attributes:
        step: number of the step.
        request: number of the request.
        num_logical: tokens computed.
        num_evicted: computed tokens that were evicted.
        num_pages: blocks held.
    """

    step: int
    request: int
    num_logical: int
    num_evicted: int
    num_pages: int

    @property
    def num_resident(self) -> int:
        """Tokens held."""
        return self.num_logical - self.num_evicted


class Load(NamedTuple):
    """The engine in one step.

    Attributes:
        num_running: requests that ran, including those that finished in the step.
        num_waiting: requests that wait after it.
        num_pages: blocks in use after it.
    """

    num_running: int
    num_waiting: int
    num_pages: int


@dataclass
class Generation:
    """Record of `generate_staggered`; lists are in the order of the prompts.

    Attributes:
        outputs: final output of each request, the last one of an aborted request; None if there was none.
        request_ids: vLLM's internal ids, which also name the traces.
        samples: a sample per running request and step, of engines with eviction.
        load: per step.
        num_preemptions: of each request.
    """

    outputs: list[RequestOutput | None]
    request_ids: list[str]
    samples: list[Sample] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    num_preemptions: list[int] = field(default_factory=list)


def generate_staggered(
    llm: vllm.LLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    every: int,
    abort_at: Mapping[int, int] | None = None,
    adapters: Mapping[int, LoRARequest] | None = None,
) -> Generation:
    """Run requests that arrive one after the other, and sample the scheduler after every step.

    Args:
        llm: an engine in this process.
        prompts: token ids.
        params: sampling parameters of each.
        every: steps between two arrivals.
        abort_at: number of a request -> step before which it is aborted.
        adapters: number of a request -> its LoRA adapter.
    """
    llm_engine = llm.llm_engine
    abort_at, adapters = abort_at or {}, adapters or {}
    done = Generation([None] * len(prompts), [], num_preemptions=[0] * len(prompts))
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    step = 0
    while len(done.request_ids) < len(prompts) or llm_engine.has_unfinished_requests():
        number = len(done.request_ids)
        if number < len(prompts) and step == number * every:
            prompt = {"prompt_token_ids": list(prompts[number])}
            adapter = adapters.get(number)
            done.request_ids.append(llm_engine.add_request(str(number), prompt, params[number], lora_request=adapter))
        if due := [done.request_ids[i] for i, at in abort_at.items() if at == step]:
            llm_engine.abort_request(due, internal=True)
        # An asynchronous engine may finish a request some steps after its last token.
        num_finished = 0
        for output in llm_engine.step():
            done.outputs[int(output.request_id)] = output
            num_finished += output.finished
        num_pages = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        done.load.append(Load(len(scheduler.running) + num_finished, len(scheduler.waiting), num_pages))
        for request in scheduler.requests.values():
            done.num_preemptions[done.request_ids.index(request.request_id)] = request.num_preemptions
        done.samples += _look_at_scheduler(llm, step, done.request_ids)
        step += 1
    return done


def _look_at_scheduler(llm: vllm.LLM, step: int, request_ids: list[str]) -> list[Sample]:
    scheduler = scheduler_of(llm)
    if not hasattr(scheduler, "block_manager"):
        return []
    scheduler.check_integrity()
    pages = scheduler.block_manager
    return [
        Sample(
            step,
            request_ids.index(request.request_id),
            request.num_computed_tokens,
            pages.num_evicted(request.request_id),
            pages.num_blocks(request.request_id),
        )
        for request in scheduler.running
    ]
