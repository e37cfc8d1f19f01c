"""`thinkv`: its quotas and central tokens against loops, its calibration, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.thinkv import calibrate, minima, silverman, valleys
from benchmarks.thinkv import density as density_of
from skipkv_vllm import ops
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.policies import make_policy
from skipkv_vllm.policies.base import Segments
from skipkv_vllm.policies.thinkv import ThinKV
from tests.reference import formulas

POLICY = ThinKV(transition_above=0.7, execution_below=0.4)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 6)), min_size=1, max_size=12),
    st.integers(1, 128),
    st.booleans(),
    st.integers(0, 600),
)
def test_quotas_equal_the_loop(known: list[tuple[float, int]], last: int, is_unfinished: bool, num_free: int) -> None:
    sparsity, memory = ([each[i] for each in known] for i in (0, 1))
    sizes = [128] * (len(known) - 1 + is_unfinished) + [last]
    padded = torch.tensor(sparsity + [-1.0] * is_unfinished), torch.tensor(memory + [0] * is_unfinished)
    segments = Segments(*padded, torch.tensor(sizes), torch.tensor(num_free), 128)
    sparsity = padded[0].double().tolist()[: len(known)]  # as float32 has them
    quota, order, steps = formulas.quotas(sparsity, list(memory), sizes, num_free, 0.7, 0.4)
    found = POLICY._quotas(segments)
    assert found.tokens.tolist() == quota
    assert found.rank.argsort().tolist() == order
    assert POLICY.remember(segments).tolist() == steps
    # Once noted, nothing shrinks further, or every layer would have its own quotas.
    again = POLICY._quotas(Segments(segments.sparsity, found.steps, segments.sizes, segments.num_free, 128))
    assert again.tokens.tolist() == quota


@pytest.mark.parametrize("seed", range(5))
def test_central_tokens_equal_the_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 90, 8, generator=generator)
    quota = torch.tensor([8, 64, 4, 32])
    counts = torch.tensor([[3, 40, 20, 15, 7, 5], [3, 9, 60, 6, 7, 5]])
    segment = torch.stack([torch.arange(-1, 5).repeat_interleave(each) for each in counts])
    found = ops.central_tokens(keys, segment, quota, 128)
    for head in range(2):
        for number, wanted in enumerate(quota.tolist()):
            members = (segment[head] == number).nonzero().flatten()
            expected = members[sorted(formulas.central(keys[head, members], wanted))]
            assert found[head].nonzero().flatten()[segment[head, found[head]] == number].tolist() == expected.tolist()
    assert not found[(segment < 0) | (segment == 4)].any()


@pytest.mark.parametrize(("heads", "group", "number", "length"), [(1, 1, 1, 30), (2, 3, 4, 40)])
def test_sparsity_is_the_definition_in_any_slot_order(heads: int, group: int, number: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = 4 * torch.randn(number, heads * group, 8, generator=generator)
    keys = torch.randn(heads, length, 8, generator=generator)
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(heads)])
    shuffled = keys.gather(1, order[..., None].expand_as(keys))
    found = ops.attention_sparsity(queries, shuffled, order, negligible=0.01)
    for head in range(heads):
        own = queries.view(number, heads, group, 8)[:, head]
        assert float(found[head]) == pytest.approx(formulas.sparsity(own, keys[head]), abs=1e-6)
    assert 0.1 < float(found.mean()) < 0.95


def test_calibration_finds_the_valleys() -> None:
    chance = np.random.default_rng(0)
    three = np.concatenate([chance.normal(mean, 0.03, 150) for mean in (0.2, 0.5, 0.8)])
    one = chance.normal(0.5, 0.05, 450)
    found = valleys(three)
    assert found is not None
    assert found.width == 1
    assert 0.27 < found.low < 0.43 < 0.57 < found.high < 0.73
    chosen, thresholds, lines = calibrate(np.stack([one, three], axis=1))
    assert (chosen, thresholds) == ([1], found)
    assert lines[0][3] != "3"
    assert lines[1] == ["1", f"{three.mean():.3f}", f"{three.std():.3f}", "3"]
    narrowed = valleys(one)
    assert narrowed is not None
    assert narrowed.width < 1
    assert len(minima(density_of(one, silverman(one)))) < 2
    assert valleys(np.full(50, 0.5)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 8}, "segment=8 is out of range; allowed: 16 to 4096"),
        ({"transition_above": 1.5}, "transition_above=1.5 is out of range"),
        ({"execution_below": 0.6}, "execution_below=0.6 is out of range; allowed: 0.0 to 0.55"),
        ({"layers": "1,x"}, "layers='1,x' is neither 'all' nor layer numbers"),
    ],
)
def test_bad_parameters_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(KVPolicyError, match=message):
        make_policy("thinkv", options)


def test_a_server_without_segments_says_so() -> None:
    with pytest.raises(KVPolicyError, match=r"needs segments, which .* --kv-request-policies thinkv"):
        RequestOptions.parse({"kv_policy": "thinkv"}, KVPolicyConfig(kv_policy="rkv"), 500)
