"""Random steps of `track_sentences`, by any backend and by `torch_backend`."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import torch

from skipkv_vllm.ops import torch_backend
from skipkv_vllm.worker.signals.sentence_tracker import OPEN
from tests.operators.token_steps import token_step

VOCABULARY = 20


def check_tracking(module: ModuleType | Any, seed: int, device: str = "cpu", steps: int = 4) -> None:
    """Run several steps of a few requests of random lengths; both states must agree after each step."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    slots, most, held = draw.randint(1, 5), 600, draw.choice((1, 3, 8))
    width, merge, embeds = draw.choice((1, 6, 200, 1500)), draw.random() < 0.5, draw.random() < 0.8
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    stored = draw.choice((dtype, torch.float32))
    delimiters = torch.zeros(VOCABULARY, dtype=torch.bool)
    delimiters[torch.randperm(VOCABULARY, generator=generator)[: draw.choice((1, 4, 10))]] = True
    states = [
        [
            torch.full((slots, most + 1), OPEN, dtype=torch.int32, device=where),
            torch.zeros(slots, dtype=torch.int64, device=where),
            torch.zeros(slots, dtype=torch.bool, device=where),
            torch.zeros(slots, device=where),
            torch.zeros(slots, width, device=where),
            torch.zeros(slots, held + 1, width, dtype=stored, device=where),
            torch.zeros(slots, 1000 if seed % 2 else 0, dtype=torch.int32, device=where),
        ]
        for where in ("cpu", device)
    ]
    position = [draw.randint(0, 50) for _ in range(slots)]
    for _ in range(steps):
        ids, table, _ = token_step(draw, generator, position, VOCABULARY)
        hidden = torch.randn(len(ids), width + 3, generator=generator)[:, 1:-2].to(dtype) if embeds else None
        for backend, state in ((torch_backend, states[0]), (module, states[1])):
            where = state[0].device
            moved = (None if hidden is None else hidden.to(where), table.to(where), int(table[2].sum()))
            backend.track_sentences(ids.to(where), *moved, delimiters.to(where), merge, *state)
        wanted, got = states[0], [each.cpu() for each in states[1]]
        # The last column of the ends and the last row of the embeddings are for discarded writes.
        assert torch.equal(got[0][:, :-1], wanted[0][:, :-1])
        assert all(torch.equal(a, b) for a, b in zip(got[1:4], wanted[1:4], strict=True))
        torch.testing.assert_close(got[4], wanted[4], rtol=1e-5, atol=1e-5)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if stored is torch.float32 else {}
        torch.testing.assert_close(got[5][:, :-1], wanted[5][:, :-1], **tolerance)
        assert torch.equal(got[6], wanted[6])
