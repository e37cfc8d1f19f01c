"""The query ring of models with latents: what it hands out meets latents as the model's own queries meet keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from skipkv_vllm.capacity import ModelShape
from skipkv_vllm.worker.signals.latent_queries import LatentQueryRing

LATENT, CONTENT, ROTATED, HEADS, LAYERS, WINDOW = 24, 6, 4, 3, 2, 4
SCALE = 0.7 * (CONTENT + ROTATED) ** -0.5


class FakeLayer(nn.Module):
    """Stands in for vLLM's MLA layer."""

    num_heads, head_size, scale = HEADS, LATENT + ROTATED, SCALE
    kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, qk_head_dim = LATENT, CONTENT, ROTATED, CONTENT + ROTATED

    def __init__(self) -> None:
        super().__init__()
        self.W_UK_T = torch.randn(HEADS, CONTENT, LATENT)
        self.seen: list[Tensor] = []

    def forward_impl(self, q, *args, output):
        self.seen.append(q)
        return output


@pytest.fixture
def layers() -> list[FakeLayer]:
    torch.manual_seed(0)
    return [FakeLayer() for _ in range(LAYERS)]


@pytest.fixture
def ring(layers) -> LatentQueryRing:
    return LatentQueryRing(
        layers, num_rows=2, window=WINDOW, num_kept=WINDOW, max_tokens=16, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


def feed(ring: LatentQueryRing, layers: list[FakeLayer], rows: list[int], count: int) -> list[Tensor]:
    """One forward pass over the first `count` tokens of a request in each row; returns the queries by layer."""
    num = len(rows) * count
    ring.place(np.array(rows), np.full(len(rows), count), np.zeros(len(rows), dtype=np.int64), num)
    queries = [torch.randn(num, HEADS, CONTENT + ROTATED) for _ in layers]
    for layer, q in zip(layers, queries, strict=True):
        assert layer.forward_impl(q, None, output="output") == "output"
        assert layer.seen[-1] is q
    return queries


@pytest.mark.parametrize("rows", [[1], [1, 0]], ids=["one", "two"])
def test_logits_are_those_of_expanded_keys(ring, layers, rows):
    queries, latents, rotated = feed(ring, layers, rows, 6), torch.randn(9, LATENT), torch.randn(9, ROTATED)

    found = ring.newest(rows, [6] * len(rows), 3)

    assert found.shape == (len(rows), LAYERS, 3, HEADS, LATENT + ROTATED)
    logits = found @ torch.cat([latents, rotated], dim=-1).T / found.shape[-1] ** 0.5
    for i, layer in enumerate(layers):
        keys = torch.einsum("kl,hpl->hkp", latents, layer.W_UK_T)
        keys = torch.cat([keys, rotated.expand(HEADS, -1, -1)], dim=-1)
        for r in range(len(rows)):
            own = queries[i][r * 6 + 3 : r * 6 + 6]
            expected = torch.einsum("nhd,hkd->nhk", own, keys) * SCALE
            torch.testing.assert_close(logits[r, i], expected)


def test_new_weights_are_used(ring, layers):
    feed(ring, layers, [0], 6)
    before = ring.newest([0], [6], WINDOW)
    layers[1].W_UK_T.mul_(2)
    after = ring.newest([0], [6], WINDOW)
    assert torch.equal(before[:, 0], after[:, 0])
    torch.testing.assert_close(before[:, 1, ..., :LATENT] * 2, after[:, 1, ..., :LATENT])


def test_nothing_is_recorded_in_a_step_that_needs_no_queries(ring, layers):
    feed(ring, layers, [0], 6)
    before = ring.newest([0], [6], WINDOW)
    ring.skip()
    for layer in layers:
        layer.forward_impl(torch.zeros(2, HEADS, CONTENT + ROTATED), output=None)
    assert torch.equal(ring.newest([0], [6], WINDOW), before)


def test_memory_is_what_was_counted(ring):
    shape = ModelShape(LAYERS, HEADS, 1, LATENT + ROTATED, 32, 100, 4, query_size=CONTENT + ROTATED)
    assert shape.ring_bytes(WINDOW, 2, 16) == ring.nbytes
    assert shape.kv_bytes == LAYERS * (LATENT + ROTATED) * 4  # one vector, no value beside it
