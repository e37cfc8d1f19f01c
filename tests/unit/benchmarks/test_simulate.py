"""The simulator: counts that follow from the lengths, conservation of blocks, and fits that recover parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.load.lengths import Offered
from benchmarks.simulate.events import Engine, Setup
from benchmarks.simulate.eviction import Eviction, assumed_cost
from benchmarks.simulate.gpus import GPUS, Efficiency
from benchmarks.simulate.steptime import StepLoad, StepTime, calibrated, fit, on_gpu
from skipkv_vllm.capacity import ModelShape
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.limits import Limits

SHAPE = ModelShape(28, 28, 4, 128, 3584, 152064, 2)
UNIT = StepTime(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_one_request_takes_a_step_a_token():
    outcome = Engine([Offered(100, 50)], Setup(100, 16, 8, 64)).run(UNIT)
    # Two chunks of the prompt, the second of which gives the first token, and one step for each further token.
    assert (outcome.steps, outcome.seconds, outcome.output_tokens) == (51, 51.0, 50)


def test_compactions_follow_from_the_lengths():
    setup = Setup(100, 16, 8, 512, limits=Limits(64, 32, 8, 0))
    outcome = Engine([Offered(40, 500)], setup).run(UNIT)
    # 539 tokens are computed, with a compaction at 96 tokens and every 32 after that, until the last token.
    assert outcome.compactions == len(range(96, 539, 32))
    assert outcome.preemptions == 0


def test_full_kv_preempts_in_a_small_pool_and_eviction_does_not():
    load = [Offered(32, 400)] * 6
    small = Setup(60, 16, 8, 512)
    full = Engine(load, small).run(UNIT)
    assert full.preemptions > 0
    assert full.peak_running > 60 // (432 // 16)
    evicting = Engine(load, replace(small, limits=Limits(64, 32, 8, 0))).run(UNIT)
    assert evicting.preemptions == 0
    assert evicting.steps < full.steps
    roomy = Engine(load, replace(small, num_pages=6 * 27)).run(UNIT)
    assert (roomy.preemptions, roomy.peak_running) == (0, 6)


def test_a_request_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="up to 32 pages and the pool has 31"):
        Engine([Offered(112, 400)], Setup(31, 16, 8, 512))
    Engine([Offered(112, 400)], Setup(31, 16, 8, 512, limits=Limits(64, 32, 8, 0)))


def test_strides_change_little():
    rng = np.random.default_rng(0)
    load = [Offered(int(p), int(o)) for p, o in zip(rng.integers(20, 200, 40), rng.integers(300, 900, 40), strict=True)]
    cost = StepTime(1e-3, 2e-3, 1e-5, 1e-5, 1e-7, 1e-4)
    for setup in (Setup(400, 16, 16, 512), Setup(400, 16, 16, 512, limits=Limits(128, 32, 8, 0))):
        exact = Engine(load, setup).run(cost)
        quick = Engine(load, replace(setup, stride=16)).run(cost)
        assert quick.seconds == pytest.approx(exact.seconds, rel=0.03)
        assert quick.compactions == pytest.approx(exact.compactions, rel=0.03, abs=3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 120)), min_size=1, max_size=12),
    st.integers(13, 60),
    st.booleans(),
    st.sampled_from([1, 4]),
)
def test_no_page_is_lost_and_everybody_ends(load, pages, evicts, stride):
    limits = Limits(24, 16, 4, 0) if evicts else None
    engine = Engine([Offered(*each) for each in load], Setup(pages, 16, 4, 64, limits=limits, stride=stride))
    outcome = engine.run(UNIT)
    assert engine.free == pages
    assert engine.promised == 0
    assert not engine.running
    assert (engine.logical >= engine.prompt + engine.output - 1).all()
    assert outcome.peak_running <= 4
    assert not (evicts and outcome.preemptions)


def test_a_fit_finds_the_costs():
    rng = np.random.default_rng(1)
    true = StepTime(1e-3, 0.0, 2e-6, 3e-5, 4e-8, 5e-4)
    requests = rng.integers(1, 40, 4000)
    prefill = np.where(rng.random(4000) < 0.1, rng.integers(1, 500, 4000), 0)
    resident, compactions = requests * rng.integers(50, 3000, 4000), rng.integers(0, 4, 4000)
    rows = [StepLoad(*row) for row in zip(requests, requests + prefill, resident, compactions, strict=True)]
    seconds = np.array([true(row) for row in rows]) * rng.normal(1, 0.02, 4000)
    found = fit(np.stack([seconds, requests, requests + prefill, prefill, resident, compactions], axis=1).astype(float))
    for name, value in found.as_dict().items():
        assert value == pytest.approx(getattr(true, name), rel=0.05, abs=1e-12), name
    no_compactions = fit(np.stack([seconds, requests, requests, prefill * 0, resident, requests * 0], 1).astype(float))
    assert no_compactions.per_compaction == 0
    assert min(no_compactions.as_dict().values()) >= 0


@pytest.mark.parametrize("rule", ["redundancy", "error", "attention", "keys"])
def test_calibration_finds_what_a_gpu_reached(rule):
    # A fit cannot tell launches from the fixed part.
    true = Efficiency(weights=0.7, attention=0.5, flops=0.4, host=1e-3, per_request=5e-6, launch=0.0, compaction=3.0)
    eviction = Eviction("method", 1152, 128, rule)
    made = on_gpu(GPUS["H100"], SHAPE, 7.6e9, 1, true, assumed_cost(GPUS["H100"], SHAPE, eviction, true))
    # In a fit, reading the weights is part of the fixed cost.
    measured = replace(made, fixed=made.fixed + made.weights, weights=0.0)
    found = calibrated(measured, GPUS["H100"], SHAPE, 7.6e9, eviction, Efficiency())
    for name in ("weights", "attention", "flops", "per_request", "launch", "compaction"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6), name


def test_a_gpus_step_has_the_right_size():
    ideal = Efficiency(weights=1.0, attention=1.0, flops=1.0, host=0.0, per_request=0.0, latency=0.0)
    step = on_gpu(GPUS["H100"], SHAPE, 7.6e9, 1, ideal)
    assert step.weights == pytest.approx(15.2e9 / 3.35e12)
    assert step(StepLoad(1, 1, 0, 0)) == pytest.approx(step.weights)
    assert step(StepLoad(1, 1, 1_000_000, 0)) - step.weights == pytest.approx(57344e6 / 3.35e12)
    halves = on_gpu(GPUS["H100"], replace(SHAPE, num_kv_heads=2, num_heads=14), 7.6e9, 2, Efficiency())
    assert halves.weights == pytest.approx(step.weights / 2 / 0.8)
    assert halves.fixed > 1e-3


EIGHT_B = ModelShape(36, 32, 8, 128, 4096, 151936, 2)


def test_a_compaction_costs_what_its_products_and_its_bytes_take():
    gpu = GPUS["H100"]
    ideal = Efficiency(attention=1.0, search=1.0, sums=1.0, errors=1.0, launch=0.0, eager=0.0)
    heads, keys, moved = 36 * 8, 2176 * 36 * 8 * 128 * 2, 2 * 128 * EIGHT_B.kv_bytes + 24 * 36 * 8 * 2176

    def seconds(rule: str, **more: str) -> float:
        return assumed_cost(gpu, EIGHT_B, Eviction("method", 2176, 128, rule, **more), ideal).per_compaction

    # Every pair of 17 blocks of 128 keys once.
    every_pair = 2 * heads * (17 * 18 / 2) * 128**2 * 128 / gpu.flops
    assert seconds("redundancy") == pytest.approx(every_pair + (4 * keys + moved) / gpu.bandwidth)
    near = 2 * heads * 2176 * 128 * 128 / gpu.flops
    assert seconds("redundancy", keys="similar") == pytest.approx(near + (4 * keys + moved) / gpu.bandwidth)
    # Four readings of 32 queries in a buffer of 128: logits twice; in two parts, outputs and products with values.
    product = 2 * 36 * 32 * 32 * 2176 * 128 / gpu.flops
    assert seconds("error") == pytest.approx(4 * (6 * product + 4 * keys / gpu.bandwidth) + moved / gpu.bandwidth)
    assert seconds("attention") == pytest.approx(4 * (2 * product + 2 * keys / gpu.bandwidth) + moved / gpu.bandwidth)
    assert seconds("keys") == pytest.approx((2 * keys + moved) / gpu.bandwidth)


def test_what_is_assumed_of_a_gpu_is_no_better_than_its_instructions_allow():
    assumed = Efficiency()
    assert assumed.search <= 128 / (32 * 4 + 16 + 8 * 4)
    assert assumed.sums <= (64 + 64) / (40 * 4 + 24 + 8 * 4 + 16 * 4 + 20 + 4 * 4)
    assert assumed.errors <= (192 + 192) / (72 * 4 + 24 + 16 * 4 + 48 * 4 + 20 + 12 * 4)
    cost = assumed_cost(GPUS["H100"], EIGHT_B, Eviction("rkv", 2176, 128, "redundancy"), assumed)
    # Somewhat more than the 0.5 ms of the products alone; and about 0.1 ms of every step for the queries.
    assert 0.5e-3 < cost.per_compaction < 1.2e-3
    assert 0.8e-4 < cost.fixed < 1.2e-4
    similar = assumed_cost(GPUS["H100"], EIGHT_B, Eviction("rkv", 2176, 128, "redundancy", "similar"), assumed)
    assert similar.per_compaction < 0.5e-3


@pytest.mark.parametrize(
    ("policy", "parameters", "rule", "tracks"),
    [
        ("rkv", {}, "redundancy", ""),
        ("skipkv", {"compat": "paper"}, "redundancy", "embeddings"),
        ("skipkv", {}, "error", "words"),
        ("h2o", {}, "attention", ""),
        ("keydiff", {}, "keys", ""),
    ],
)
def test_a_methods_rule_follows_from_what_it_needs(policy, parameters, rule, tracks):
    config = KVPolicyConfig.parse({"kv_policy": policy, "kv_policy_config": parameters, "kv_budget": 512})
    found = Eviction.of(config, 640, "similar")
    assert (found.method, found.rule, found.tracks, found.keys) == (policy, rule, tracks, "similar")
    assert found.records == (policy != "keydiff")
