"""Random traffic for the block manager, and single steps of it."""

from __future__ import annotations

from hypothesis import strategies as st

from skipkv_vllm.core.limits import Limits
from tests.unit.integration.engine import LONGEST, Engine

PREFIXES = [[7] * 4, list(range(8)), list(range(14)), [*range(8), *range(30, 40)]]
arrivals = st.tuples(
    st.just("arrive"),
    st.integers(0, len(PREFIXES) - 1),
    st.integers(0, 6),  # tokens after the prefix
    st.integers(0, 1),  # which of them
    st.one_of(
        st.none(),
        st.tuples(st.integers(5, 16), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.sampled_from([0, 0, 3])),
    ),
)
steps = st.tuples(st.just("step"), st.integers(1, 6), st.sampled_from([1, 3, 64]))
others = st.tuples(st.sampled_from(["finish", "preempt"]), st.integers(0, 7))


def apply(engine: Engine, operation: tuple) -> None:
    match operation:
        case ("arrive", prefix, tail, flavour, drawn):
            prompt = [*PREFIXES[prefix], *(100 + flavour for _ in range(tail))]
            limits = None
            if drawn is not None:
                budget, buffer, window, protects, num_draft = drawn
                limits = Limits(budget, buffer, window, len(prompt) if protects else 0)
                if num_draft and not protects:
                    limits = Limits(budget, buffer, window, 0, prompt_end=len(prompt), num_draft=num_draft)
            engine.arrive(prompt, limits)
        case ("step", times, chunk):
            for _ in range(times):
                engine.step(chunk)
                engine.check()
                # vLLM ends a request that would outgrow the pool; these lines end it at the longest length.
                for request_id in [r for r in engine.running if engine.tracked[r].request.num_tokens > LONGEST]:
                    engine.leave(request_id)
        case ("finish", which):
            everyone = engine.running + engine.waiting
            if everyone:
                engine.leave(everyone[which % len(everyone)])
        case ("preempt", which):
            if engine.running:
                engine.preempt(engine.running[which % len(engine.running)])


def finish_all(engine: Engine) -> None:
    for request_id in list(engine.tracked):
        engine.leave(request_id)
    engine.check()
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1, "blocks were lost"
    assert not engine.manager.req_to_blocks
    assert not engine.requests
    assert not engine.manager.num_cached_block
    assert engine.manager.ledger.num_promised == 0
    assert not engine.manager.ledger._num_holders


TOTALS: dict[str, int] = {}


def drive(engine: Engine, steps: int, chunk: int = 64) -> None:
    for _ in range(steps):
        engine.step(chunk)
        engine.check()
