"""Random steps of `track_thoughts`, by any backend and by `torch_backend`."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import torch

from skipkv_vllm.ops import KEYWORD_SHIFT, STATE, THOUGHT, torch_backend
from tests.operators.token_steps import token_step

VOCABULARY = 24
STATES, CLASSES = 5, 4


def check_thoughts(module: ModuleType | Any, seed: int, device: str = "cpu", steps: int = 5) -> None:
    """Run several steps of a few requests of random lengths; both must agree after each step."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    slots, most = draw.randint(1, 6), 900
    flags = [draw.choice((0, 0, 0, THOUGHT.SPLIT | THOUGHT.DELIMITER, THOUGHT.DELIMITER)) for _ in range(VOCABULARY)]
    flags[0], flags[1] = THOUGHT.BEGIN, THOUGHT.END
    flags[2] |= THOUGHT.SPLIT
    vocabulary = torch.tensor([f | draw.randrange(CLASSES) << KEYWORD_SHIFT for f in flags], dtype=torch.int32)
    keywords = torch.tensor(
        [[draw.randrange(STATES) << 2 | draw.choice((0, 0, 1, 2, 3)) for _ in range(CLASSES)] for _ in range(STATES)],
        dtype=torch.int32,
    )
    merge, interval = draw.random() < 0.5, draw.choice((1, 2, 7, 128))
    strengths = torch.randn(slots, 3, generator=generator)
    strengths[:, 2] = draw.choice((torch.inf, 0.9))
    strengths[0, :2] = 0  # coefficients of exactly zero
    state = torch.zeros(slots, len(STATE), dtype=torch.int32)
    state[:, 0] = torch.arange(slots) + 1
    state[:, 1] = torch.randint(2, (slots,), generator=generator)
    row, coefficient = torch.zeros(most, dtype=torch.int32), torch.zeros(most)
    sides = [
        [torch_backend, "cpu", state.clone(), row.clone(), coefficient.clone()],
        [module, device, *(t.to(device) for t in (state, row, coefficient))],
    ]
    position, written = [draw.randint(0, 300) for _ in range(slots)], 0
    for _ in range(steps):
        ids, table, end = token_step(draw, generator, position, VOCABULARY)
        for backend, where, *buffers in sides:
            inputs = (t.to(where) for t in (ids, table, vocabulary, keywords))
            backend.track_thoughts(*inputs, merge, interval, strengths.to(where), buffers[0], written, *buffers[1:])
        written = end
        wanted, got = sides[0][2:], [each.cpu() for each in sides[1][2:]]
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])
        steered = wanted[1] != 0
        # Bit by bit: all ranks, and a resumed request, must find the same coefficients.
        assert torch.equal(got[2][steered], wanted[2][steered])
