# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
"""`track_thoughts`, one program a request."""

from __future__ import annotations

import triton.language as tl

from .kernel import kernel


@kernel()
def track(
    token_ids,
    spans,
    vocabulary,
    keywords,
    strengths,
    state,
    choice,
    coefficient,
    requests,
    classes,
    interval,
    merge: tl.constexpr,
    columns: tl.constexpr,
):
    """See `torch_backend.track_thoughts`; the numbers are those of `STATE`, `THOUGHT` and `KEYWORD_SHIFT`."""
    request = tl.program_id(0)
    row = tl.load(spans + request)
    begin = tl.load(spans + requests + request)
    number = tl.load(spans + 2 * requests + request)
    position = tl.load(spans + 3 * requests + request)
    alpha0 = tl.load(strengths + 3 * row).to(tl.float64)
    gamma = tl.load(strengths + 3 * row + 1).to(tl.float64)
    most = tl.load(strengths + 3 * row + 2).to(tl.float64)
    state += row * columns
    vector = tl.load(state)
    thinking = tl.load(state + 1)
    kinds = tl.load(state + 2)
    machine = tl.load(state + 3)
    after = tl.load(state + 4)
    latched = tl.load(state + 5)
    execution = tl.load(state + 6)
    reflection = tl.load(state + 7)
    transition = tl.load(state + 8)
    steered = tl.load(state + 9)
    i = number * 0
    while i < number:
        flags = tl.load(vocabulary + tl.load(token_ids + begin + i))
        step = tl.load(keywords + machine * classes + (flags >> 4))
        machine = step >> 2
        kinds = kinds | (step & 3)
        ends = (flags >> 3) & 1
        thinking = (thinking | ((flags >> 2) & 1)) & (1 - ends)
        # In double precision the product is exact, so that a fused multiply-add changes nothing.
        alpha = tl.minimum(alpha0 + gamma * latched.to(tl.float64), most).to(tl.float32)
        used = ((thinking & flags & 1) != 0) & (alpha != 0)
        tl.store(choice + begin + i, vector, mask=used)
        tl.store(coefficient + begin + i, alpha, mask=used)
        steered += used.to(tl.int32)
        delimiter = (flags >> 1) & 1
        closes = delimiter & (1 - after * merge)
        reflects = kinds & 1
        changes = (kinds >> 1) & (1 - reflects)
        reflection += closes * reflects
        transition += closes * changes
        execution += closes * (1 - reflects) * (1 - changes)
        machine = machine * (1 - delimiter)
        kinds = kinds * (1 - delimiter)
        after = delimiter
        takes = ((position + i + 1) % interval == 0).to(tl.int32)
        latched = takes * (reflection + transition) + (1 - takes) * latched
        i += 1
    tl.store(state + 1, thinking)
    tl.store(state + 2, kinds)
    tl.store(state + 3, machine)
    tl.store(state + 4, after)
    tl.store(state + 5, latched)
    tl.store(state + 6, execution)
    tl.store(state + 7, reflection)
    tl.store(state + 8, transition)
    tl.store(state + 9, steered)
