"""The list of moves that brings the survivors into the first slots."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkv_vllm import ops


def test_move_list_literal():
    # Slots 1 and 3 of the first four are evicted; 5 and 6 move into them, in order. The third entry is padding.
    kept = torch.tensor([True, False, True, False, False, True, True])
    source, hole, valid = ops.move_list(kept, 4)
    assert valid.tolist() == [True, True, False]
    assert source[:2].tolist() == [5, 6]
    assert hole[:2].tolist() == [1, 3]


def test_move_list_has_nothing_to_do_for_a_prefix():
    source, hole, valid = ops.move_list(torch.tensor([[True, True, False, False]]), 2)
    assert source.shape == hole.shape == valid.shape == (1, 2)
    assert not valid.any()


@st.composite
def kept_rows(draw):
    length = draw(st.integers(1, 40))
    num_keep = draw(st.integers(1, length))
    rows = draw(st.integers(1, 4))
    order = [draw(st.permutations(range(length))) for _ in range(rows)]
    kept = torch.zeros(rows, length, dtype=torch.bool)
    for row, permutation in enumerate(order):
        kept[row, list(permutation[:num_keep])] = True
    return kept, num_keep


@settings(max_examples=300, deadline=None)
@given(kept_rows())
def test_moves_fill_exactly_the_first_slots(example):
    kept, num_keep = example
    length = kept.shape[1]
    source, hole, valid = ops.move_list(kept, num_keep)
    assert source.shape[-1] <= min(num_keep, length - num_keep)
    for row in range(kept.shape[0]):
        moves = [
            (s, h) for s, h, v in zip(source[row].tolist(), hole[row].tolist(), valid[row].tolist(), strict=True) if v
        ]
        sources, holes = [s for s, _ in moves], [h for _, h in moves]
        assert len(set(sources)) == len(sources)
        assert len(set(holes)) == len(holes)
        assert not set(sources) & set(holes)
        assert all(0 <= h < num_keep <= s < length for s, h in moves)
        cells = list(range(length))
        for s, h in moves:
            cells[h] = s
        assert sorted(cells[:num_keep]) == kept[row].nonzero().flatten().tolist()
        # Padding must still be a valid address.
        assert all(0 <= s < length for s in source[row].tolist())
        assert all(0 <= h < length for h in hole[row].tolist())


def test_move_list_of_many_layers_and_heads_equals_row_by_row():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 2, 50, generator=generator)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(20).indices, True)
    together = ops.move_list(kept, 20)
    for layer in range(3):
        for head in range(2):
            alone = ops.move_list(kept[layer, head], 20)
            assert all(torch.equal(a[layer, head], b) for a, b in zip(together, alone, strict=True))
