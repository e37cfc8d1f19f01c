"""Unequal budgets: equal ones against the oracle, the shares against loops."""

from __future__ import annotations

import argparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.results.sections.unequal_budgets import again_section, gains, unequal_section
from benchmarks.tiny_reasoner import PAPER_PARAMETERS
from benchmarks.unequal_budgets.allocation import ByHead, ByLayer, Equal, shares
from benchmarks.unequal_budgets.bench import Bench, policy_of
from skipkv_vllm import bundled_model
from tests.reference.model import Model
from tests.reference.request import generate
from tests.reference.settings import Settings

BUDGET, BUFFER, WINDOW, NUM_NEW = 90, 24, 8, 160


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(argparse.Namespace(problems=2, train=2, window=WINDOW, buffer=BUFFER, max_tokens=NUM_NEW))


@pytest.fixture(scope="module")
def oracle() -> Model:
    return Model(bundled_model())


@pytest.mark.parametrize("method", ["snapkv", "rkv", "skipkv"])
def test_equal_budgets_are_the_oracles(bench: Bench, oracle: Model, method: str) -> None:
    parameters = tuple(PAPER_PARAMETERS.items()) if method == "skipkv" else ()
    rows = bench.rows()
    rows.advance(BUDGET + BUFFER)
    held = []
    while not rows.is_done:
        rows.compact(policy_of(method), Equal(), BUDGET, BUFFER)
        held.append(torch.stack([layer.positions[..., :BUDGET] for layer in rows.layers], dim=1).long())
        rows.advance(rows.num_logical + BUFFER)
    for i, prompt in enumerate(bench.prompts):
        settings = Settings(method, "head", BUDGET, BUFFER, WINDOW, parameters=parameters)
        expected = generate(oracle, prompt, NUM_NEW, settings)
        assert rows.answers[i] == expected.tokens
        assert len(expected.events) >= 3
        assert all(
            torch.equal(positions[i], event.kept) for positions, event in zip(held, expected.events, strict=False)
        )


@pytest.mark.parametrize("allocation", [ByHead(), ByLayer((1.0, 0.9, 0.95, 0.8), 1.1)])
def test_unequal_budgets_hold_the_same_total(bench: Bench, allocation: ByHead | ByLayer) -> None:
    rows = bench.rows()
    rows.advance(BUDGET + BUFFER)
    counts = []
    while not rows.is_done:
        rows.compact(policy_of("rkv"), allocation, BUDGET, BUFFER)  # asserts the total
        counts.append(torch.stack([layer.counts for layer in rows.layers]))
        rows.advance(rows.num_logical + BUFFER)
    assert len(counts) >= 3
    assert all(len(each.unique()) > 1 for each in counts)
    assert all(len(answer) == NUM_NEW for answer in rows.answers)
    for layer in rows.layers:
        for row, head in [(0, 0), (1, 1)]:
            held = layer.positions[row, head, : layer.counts[row, head]]
            assert (held.diff() > 0).all()
            assert set(range(rows.num_prompt)) <= set(held.tolist())


def test_by_head_takes_the_best_of_a_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, heads, length, keep, num_pinned = 3, 2, 40, 16, 6
    score = torch.randint(0, 30, (rows, heads, length), generator=generator).float()
    score[:, 1] += 20  # so that one head would get almost everything
    pinned = torch.zeros(rows, heads, length, dtype=torch.bool)
    pinned[..., :4] = pinned[..., -2:] = True
    (kept,) = ByHead().select([score], [pinned], num_pinned, keep)
    floor = int(0.2 * (keep - num_pinned))
    for r in range(rows):
        free = [(-score[r, h, i].item(), i, h) for h in range(heads) for i in range(length) if not pinned[r, h, i]]
        chosen = {token for h in range(heads) for token in sorted(t for t in free if t[2] == h)[:floor]}
        for token in sorted(free):
            if len(chosen) < heads * (keep - num_pinned):
                chosen.add(token)
        found = {(h, i) for h, i in (kept[r] & ~pinned[r]).nonzero().tolist()}
        assert found == {(h, i) for _, i, h in chosen}
        assert (kept[r] & pinned[r]).sum() == heads * num_pinned
    assert kept[:, 0].sum(-1).eq(num_pinned + floor).any(), "the floor never applied"


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda weights: max(weights) > 0.01),
    st.integers(8, 60),
    st.data(),
)
def test_shares(weights: list[float], equal: int, data: st.DataObject) -> None:
    total, least = equal * len(weights), equal // 4
    most = [data.draw(st.integers(equal, 3 * equal)) for _ in weights]
    numbers = shares(weights, total, least, most)
    assert sum(numbers) == total
    assert all(least <= number <= limit for number, limit in zip(numbers, most, strict=True))
    inner = [i for i, number in enumerate(numbers) if least + 1 < number < most[i] - 1]
    for i in inner:
        for j in inner:
            if weights[i] > 1e-3 and weights[j] > 1e-3:
                assert abs(numbers[i] * weights[j] - numbers[j] * weights[i]) <= weights[i] + weights[j]


def test_the_profile_knows_that_first_keys_depend_on_no_other_token(bench: Bench) -> None:
    similarity = bench.similarity()
    assert similarity[0] == pytest.approx(1, abs=1e-6)
    assert all(0 < each < 0.999 for each in similarity[1:])
    weights = ByLayer(similarity, 1.1).weights()
    assert weights[0] == pytest.approx(0, abs=1e-3)
    assert max(weights) == pytest.approx(1)


def test_gains_and_verdict() -> None:
    def arm(base: str, shares: str, correct: list[int]) -> dict:
        return {"base": base, "budget": "25%", "shares": shares, "correct": correct}

    wins, draws = [0] * 10 + [1] * 90, [0, 1] * 50
    arms = [arm("rkv", "equal", [0] * 50 + [1] * 50), arm("rkv", "adakv", wins)]
    arms += [arm("snapkv", "equal", draws), arm("snapkv", "adakv", draws)]
    rows = {(row["shares"], row["base"], row["budget"]): row for row in gains(arms)}
    assert rows["adakv", "rkv", "25%"]["gain"] == rows["adakv", "rkv", "all"]["gain"] == pytest.approx(40)
    assert rows["adakv", "snapkv", "25%"]["gain"] == 0
    assert rows["adakv", "all", "all"]["gain"] == pytest.approx(20)
    assert rows["adakv", "all", "all"]["low"] > 0
    machine = {"cores": 1, "cpu": "a CPU"}
    run = {
        "settings": {"problems": 100, "train": 4, "skip": 100},
        "machine": machine,
        "command": ["python"],
        "commit": "c",
    }
    profile = [{"layer": 0, "similarity": 1.0}]
    figures = {"run": run, "full": {"accuracy": 1.0}, "profile": profile, "arms": arms}
    text = "\n".join(unequal_section(figures))
    assert "from the 101st on" in "\n".join(again_section(figures))
    assert "the rule is met: `adakv` +20.0" in text
    assert "Of 2 single cells 1 meet it (`adakv` with `rkv` at 25% (+40.0))" in text
    assert "| rkv | 25% | 50.0 | +40.0 [" in text
