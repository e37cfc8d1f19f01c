"""The draws of `random`."""

from __future__ import annotations

import torch

from skipkv_vllm.policies import View, make_policy


def test_random_draws_are_independent():
    policy = make_policy("random")
    draws = []
    for length in (2000, 2001, 2128):
        positions = torch.arange(length - 2000, length, dtype=torch.int32).expand(4, -1)
        for layer in range(3):
            draws.append(policy.score(View(positions=positions, window=8, layer=layer)) > 0.5)
    kept = torch.cat(draws).double()
    # Half of the tokens, half of their neighbours, and half of the tokens that any other head, layer or length keeps.
    assert (kept.mean(1) - 0.5).abs().max() < 0.06
    for distance in range(1, 20):
        both = (kept[:, distance:] * kept[:, :-distance]).mean(1)
        assert (both - 0.25).abs().max() < 0.06, distance
    overlap = kept @ kept.T / kept.shape[1]
    assert (overlap - torch.eye(len(kept)) * 0.25 - 0.25).abs().max() < 0.06


def test_random_draws_depend_on_the_head_of_the_model_not_of_the_rank():
    policy, positions = make_policy("random"), torch.arange(50, dtype=torch.int32).expand(4, -1)
    whole = policy.score(View(positions=positions, window=8))
    second = policy.score(View(positions=positions[2:], window=8, first_head=2))
    assert torch.equal(second, whole[2:])
    assert not torch.equal(second, whole[:2])
