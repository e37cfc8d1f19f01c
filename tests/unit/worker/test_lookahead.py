"""Prompts that are compacted by queries of tokens computed ahead: of a question, or of a draft answer."""

from __future__ import annotations

import pytest

from tests.simulation import Simulation


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("granularity", ["head", "sentence"])
@pytest.mark.parametrize("num_question", [0, 1, 3])
def test_a_prompt_is_compacted_by_its_question_as_soon_as_it_is_computed(num_question, granularity, layout):
    parameters = {"task_tokens": num_question}
    sim = Simulation("finch", protect=False, parameters=parameters, layout=layout, granularity=granularity)
    # One prompt exceeds its bound, one only its budget, one is shorter than its question, one than its budget.
    prompts, budgets = {"a": 45, "b": 27, "c": 2, "d": 15}, {"a": 26, "b": 26, "c": 26, "d": 20}
    for name, num_prompt in prompts.items():
        sim.start(name, num_prompt=num_prompt, budget=budgets[name])
    sim.step({"a": 30, "b": 27, "c": 2, "d": 10})
    sim.step({"a": 15, "b": 1, "d": 5})
    assert [sim.running[name].num_compactions for name in prompts] == [0, 1, 0, 0]
    sim.step(dict.fromkeys(prompts, 1))
    assert [sim.running[name].num_compactions for name in prompts] == [1, 1, 0, 0]
    assert sim.running["a"].num_resident == 27
    for _ in range(40):
        sim.step(dict.fromkeys(prompts, 1))
    for name, num_prompt in prompts.items():
        assert sim.running[name].num_compactions >= 2
        # The question is held whatever was written since.
        question = set(range(max(0, num_prompt - (num_question or 4)), num_prompt))
        assert all(question <= set(held) for held in sim.positions(name).flatten(0, 1).tolist())


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("has_spare_blocks", [True, False])
def test_a_question_is_asked_after_each_chunk(has_spare_blocks, layout):
    parameters = {"ask_chunks": True, "task_tokens": 3}
    sim = Simulation("finch", protect=False, parameters=parameters, layout=layout, ratio=2, max_length=66)
    sim.has_spare_blocks = has_spare_blocks
    # In the last chunk of "a" the question would end beyond the longest sequence.
    prompts, budgets = {"a": 65, "b": 47}, {"a": 24, "b": 26}
    for name, num_prompt in prompts.items():
        sim.start(name, num_prompt=num_prompt, budget=budgets[name])
    sim.step({"a": 32, "b": 34})
    chunks = {"a": [8, 8, 8, 8, 1], "b": [8, 5]}
    num_question = []
    while any(chunks.values()):
        sim.step({name: each.pop(0) for name, each in chunks.items() if each})
        num_question.append([request.num_lookahead for request in sim.running.values()])
    expected = [[3, 3], [3, 3], [3, 0], [3, 0], [2, 0]] if has_spare_blocks else [[0, 0]] * 5
    assert num_question == expected
    sim.step({"a": 0})
    assert [sim.running[name].num_compactions for name in prompts] == [6, 3]
    for name in prompts:
        sim.check(name)


@pytest.mark.parametrize("layout", ["gpu strided", "vec"])
@pytest.mark.parametrize("with_window", [False, True])
@pytest.mark.parametrize("has_spare_blocks", [True, False])
def test_a_prompt_is_compacted_by_tokens_that_are_decoded_ahead(with_window, has_spare_blocks, layout):
    parameters = {"with_window": with_window, "lookahead": 6}
    sim = Simulation("laq", protect=False, parameters=parameters, layout=layout, ratio=2, max_length=50)
    sim.has_spare_blocks = has_spare_blocks
    prompts = {"a": 45, "b": 27, "c": 15, "d": 29}
    for name, num_prompt in prompts.items():
        sim.start(name, num_prompt=num_prompt, budget=26)
    sim.start("plain", num_prompt=9, budget=1, policy="none")
    # Two prompts end in the same step, one after two chunks; "a" reaches the longest sequence after five tokens.
    sim.step({"a": 20, "b": 27, "c": 15, "plain": 9})
    sim.step({"plain": 1, "a": 25, "c": 1, "d": 29})
    assert [sim.running[name].num_compactions for name in prompts] == [0, 1, 0, 0]
    free = sorted(sim.pool.free)
    sim.step(dict.fromkeys(prompts, 0))
    assert [sim.running[name].num_compactions for name in prompts] == [1, 1, 0, 1]
    assert sorted(set(free) & set(sim.pool.free)) == free, "a block was lost"
    num_drafted = [sim.running[name].num_lookahead for name in prompts]
    assert num_drafted == ([5, 6, 0, 6] if has_spare_blocks else [0, 0, 0, 0])
    for _ in range(24):
        sim.step(dict.fromkeys(prompts, 1))
    for name in (*prompts, "plain"):
        sim.check(name)
    assert [sim.running[name].num_compactions for name in prompts] == [3, 3, 1, 3]
    assert not any(sim.running[name].num_lookahead for name in prompts)


def test_queries_of_tokens_decoded_ahead_decide_other_than_the_window():
    """Otherwise the comparison above would show little."""
    kept = []
    for has_spare_blocks in (True, False):
        sim = Simulation("laq", protect=False)
        sim.has_spare_blocks = has_spare_blocks
        sim.start("a", num_prompt=45, budget=26)
        sim.step({"a": 45})
        sim.step({"a": 0})
        kept.append(sim.positions("a").sort(-1).values)
    assert (kept[0] != kept[1]).any(dim=-1).all()
