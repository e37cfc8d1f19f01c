"""The default score of `skipkv`: against its formula token by token, and the purpose of each part."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipkv_vllm import ops
from skipkv_vllm.ops import torch_backend
from skipkv_vllm.policies import Measured, View, make_policy
from skipkv_vllm.policies.skipkv import SkipKV
from tests.operators.cases import MeasureCase, Pages
from tests.reference import formulas

SHAPE = (2, 2, 3)  # requests, layers, heads
N, DIM = 40, 8
FREE, RECENT = range(5, 96), 88


def example(seed: int, lengths: tuple[int, int] = (40, 27)) -> tuple[Measured, Tensor, Tensor]:
    """Rows in any slot order and their keys: of 100 positions 5 are protected, the last 12 recent, 4 in the window."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    keys = torch.randn(*SHAPE, N, DIM, generator=generator) + torch.randn(DIM, generator=generator)
    errors = torch.rand(*SHAPE, N, generator=generator) ** 8
    errors[..., 3] = 0.0
    positions = torch.zeros(*SHAPE, N, dtype=torch.int32)
    similarity, is_held = torch.zeros(*SHAPE, N), torch.zeros(*SHAPE, N, dtype=torch.bool)
    for row in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist():
        length = lengths[row[0]]
        held = chance.sample(range(100), length)
        positions[(*row, slice(0, length))] = torch.tensor(held, dtype=torch.int32)
        similarity[(*row, slice(0, length))] = ops.key_similarity(keys[tuple(row)][None, :length])[0]
        is_held[(*row, slice(0, length))] = True
    repeated = torch.tensor([0.0, 0.0, 0.25, 0.6, 1.0])[torch.randint(5, (*SHAPE, N), generator=generator)]
    is_free = is_held & (positions >= FREE.start) & (positions < FREE.stop)
    return Measured(errors, similarity, repeated, positions >= RECENT, is_free), positions, keys


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_the_formula_token_by_token(seed):
    lengths = (40, 27)
    measured, positions, keys = example(seed, lengths)
    scores = SkipKV().rank(measured)
    assert scores.shape == (*SHAPE, N)
    for row in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist():
        here = (*row, slice(0, lengths[row[0]]))
        wanted = formulas.skipkv(
            measured.output_error[here].tolist(),
            keys[here],
            measured.repeated[here].tolist(),
            positions[here].tolist(),
            FREE,
            RECENT,
        )
        torch.testing.assert_close(scores[here].double(), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-4)


def test_padding_changes_no_score():
    measured, _, _ = example(1)
    scores = SkipKV().rank(measured)[1, ..., :27]
    other = replace(measured, **{name: getattr(measured, name).clone() for name in ("output_error", "key_similarity")})
    other.output_error[1, ..., 27:], other.key_similarity[1, ..., 27:] = 1e9, -7.0
    assert torch.equal(SkipKV().rank(other)[1, ..., :27], scores)


def view_of(measured: Measured, positions: Tensor, keys: Tensor) -> View:
    """One layer of the first request, in ascending position. Half of 29 - 5 tokens are recent, as in `example`."""
    order = positions[0, 1].argsort(dim=-1)
    held = keys[0, 1].gather(1, order[..., None].expand_as(keys[0, 1])).transpose(0, 1)
    error, share, ascending = (x[0, 1].gather(-1, order) for x in (measured.output_error, measured.repeated, positions))
    return View(
        ascending, 4, 29, num_logical=100, num_protected=5, keys=held, output_error=error, sentence_penalty=share
    )


def test_the_score_of_one_layer_is_the_rank_of_its_rows():
    measured, positions, keys = example(2)
    order = positions[0, 1].argsort(dim=-1)
    wanted = SkipKV().rank(measured)[0, 1].gather(-1, order)
    torch.testing.assert_close(SkipKV().score(view_of(measured, positions, keys)), wanted)


@pytest.mark.parametrize(("keep", "protected", "recent"), [(29, 5, 12), (64, 0, 32), (10, 10, 0), (11, 0, 5)])
def test_recent_tokens_are_half_of_what_a_small_budget_leaves_beside_the_prompt(keep, protected, recent):
    assert SkipKV().num_recent(keep, protected) == recent
    assert SkipKV(recent_share=1.0).num_recent(keep, protected) == keep - protected
    assert SkipKV(recent_share=0.0, older_scale=100.0).num_recent(keep, protected) == 0


@pytest.mark.parametrize(("left", "older"), [(256, 128), (1024, 256), (4096, 512)])
def test_older_tokens_grow_with_the_root_of_what_is_left(left, older):
    assert SkipKV().num_recent(left + 80, 80) == left - older
    assert SkipKV(older_scale=4.0).num_recent(left, 0) == left - older // 2


def test_being_recent_adds_its_weight():
    measured, _, _ = example(3)
    scores, plain = SkipKV(recent_weight=2.5).rank(measured), SkipKV(recent_weight=0.0).rank(measured)
    torch.testing.assert_close(scores - plain, 2.5 * measured.is_recent, rtol=0, atol=1e-5)
    assert torch.equal(plain, SkipKV(recent_weight=0.0).rank(replace(measured, is_recent=~measured.is_recent)))


def row(**changes: list[float]) -> Tensor:
    """Return the scores of six evictable tokens that are equal except for the changes."""
    values = {"output_error": [1e-2, 2e-2] * 3, "key_similarity": [0.4, 0.5] * 3, "repeated": [0.0] * 6}
    tensors = {name: torch.tensor(changes.get(name, value)) for name, value in values.items()}
    everyone = torch.ones(6, dtype=torch.bool)
    return SkipKV().rank(Measured(**tensors, is_recent=~everyone, is_free=everyone))


def test_what_makes_a_token_leave():
    errors, same = [1e-2, 1e-4, 1e-2, 1e-3, 1e-2, 1e-2], [0.5, 0.4] * 3
    assert row(output_error=errors, key_similarity=same).argsort(stable=True)[:2].tolist() == [1, 3]
    scores = row(repeated=[0.0, 0.0, 1.0, 0.0, 0.8, 0.0])
    assert scores[2] < scores[4] < scores[0]
    # A few words that recur by chance weigh almost nothing.
    assert float(scores[0] - row(repeated=[0.3, *[0.0] * 5])[0]) < 0.01
    scores = row(key_similarity=[0.5, 0.5, 0.9, 0.5, 0.1, 0.5])
    assert scores[2] < scores[0] < scores[4]


def test_scores_are_finite_at_the_extremes():
    assert row(output_error=[0.0] * 6, key_similarity=[1.0] * 6, repeated=[1.0] * 6).isfinite().all()
    measured, _, _ = example(0)
    nobody = replace(measured, is_free=torch.zeros_like(measured.is_free))
    assert SkipKV().rank(nobody).isfinite().all()
    assert row(output_error=[1e30, 0.0, 1e-30, 1.0, 1.0, 1.0]).isfinite().all()


def test_the_scale_of_errors_is_no_matter():
    """Neither the scale of a model's values nor that of an 8-bit cache matters."""
    measured, _, _ = example(1)
    scores = SkipKV().rank(measured)[measured.is_free]
    for other in (2.0**30 * measured.output_error, 2.0**-30 * measured.output_error):
        found = SkipKV().rank(replace(measured, output_error=other))[measured.is_free]
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


def test_weights_of_the_parts():
    measured, _, _ = example(2)
    alone = SkipKV(key_weight=0.0, sentence_weight=0.0, recent_weight=0.0).rank(measured)
    for errors, scores, free in zip(
        *(x.flatten(0, -2) for x in (measured.output_error, alone, measured.is_free)), strict=True
    ):
        worth = errors[free].clamp(min=1e-6 * float(errors[free].mean())).log()
        wanted = (worth - worth.mean()) / worth.std(correction=0)
        torch.testing.assert_close(scores[free], wanted, rtol=1e-4, atol=1e-4)
    unrepeated = replace(measured, repeated=torch.zeros_like(measured.repeated))
    assert torch.equal(SkipKV(sentence_weight=0.0).rank(measured), SkipKV(sentence_weight=0.0).rank(unrepeated))
    assert not torch.equal(SkipKV().rank(measured), SkipKV().rank(unrepeated))


@pytest.mark.parametrize("compat", ["paper", "published"])
def test_the_rule_of_the_paper_is_rkv_less_the_penalty(compat):
    measured, positions, keys = example(0)
    queries = torch.randn(4, 6, DIM, generator=torch.Generator().manual_seed(0))
    view = replace(view_of(measured, positions, keys), queries=queries)
    policy = make_policy("skipkv", {"compat": compat, "mix": 0.3})
    wanted = make_policy("rkv", {"mix": 0.3}).score(view) - view.sentence_penalty
    torch.testing.assert_close(policy.score(view), wanted)
    assert policy._rkv == make_policy("rkv", {"mix": 0.3})
    assert policy.sentence_options.compat == ("published" if compat == "published" else "default")
    assert policy.decay == 0.7


# ---- measuring


def leaving_out(query: Tensor, keys: Tensor, values: Tensor) -> list[float]:
    """`A^2 |v - o|^2` of every token for one query head, in double precision."""
    weights = formulas.attention(query.double(), keys.double(), len(keys))
    output = sum(a * v for a, v in zip(weights, values.double(), strict=True))
    return [a * a * float((v - output).square().sum()) for a, v in zip(weights, values.double(), strict=True)]


@pytest.mark.parametrize("group", [1, 3])
def test_output_errors_are_the_formula_query_by_query(group):
    generator = torch.Generator().manual_seed(group)
    keys, values = (torch.randn(2, 9, DIM, generator=generator) for _ in range(2))
    queries = torch.randn(2, group, 5, DIM, generator=generator)
    attention = (queries @ keys[:, None].transpose(-1, -2) / DIM**0.5).softmax(dim=-1)
    found = ops.output_error(attention, values)
    for head in range(2):
        rows = [leaving_out(q, keys[head], values[head]) for heads in queries[head] for q in heads]
        wanted = torch.tensor(rows).sum(dim=0) / group
        torch.testing.assert_close(found[head], wanted.float(), rtol=1e-4, atol=1e-6)


def test_an_output_error_is_the_change_to_first_order():
    """Removing a token with little attention changes the output by A |v - o|; the error is its square."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 200, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    query = torch.randn(1, 1, 1, DIM, generator=generator, dtype=torch.float64)
    logits = query @ keys[:, None].transpose(-1, -2) / DIM**0.5
    attention, errors = logits.softmax(dim=-1), ops.output_error(logits.softmax(dim=-1).float(), values)
    token = int(attention.argmin())
    kept = [i for i in range(200) if i != token]
    change = attention @ values[:, None] - logits[..., kept].softmax(dim=-1) @ values[:, None, kept]
    assert float(change.square().sum()) == pytest.approx(float(errors[0, token]), rel=0.01)


def test_key_similarity_is_the_cosine_with_the_mean_direction():
    keys = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    wanted = torch.nn.functional.cosine_similarity(unit, unit.mean(dim=1, keepdim=True), dim=-1)
    torch.testing.assert_close(ops.key_similarity(keys), wanted.float())
    torch.testing.assert_close(ops.key_similarity(keys * torch.rand(2, 9, 1).add(0.1)), wanted.float())
    assert ops.key_similarity(torch.zeros(1, 4, DIM)).isfinite().all()


@pytest.mark.parametrize("effect", [ops.Effect.ATTENTION, ops.Effect.OUTPUT])
def test_sums_do_not_depend_on_how_many_queries_are_taken_at_once(effect):
    """Accumulate all queries at once, or some now and the others later: `NUM_ACCUMULATED` changes only the cost."""
    case = MeasureCase(Pages(heads=2), (60, 41), (8, 8), 8, positions="sorted")
    whole = case.build()
    rest = whole._replace(queries=whole.queries[:, :, 3:], num_queries=whole.num_queries - 3)
    first = whole._replace(
        queries=whole.queries[:, :, :3], num_queries=torch.full_like(whole.num_queries, 3), newest=whole.newest - 5
    )
    together, *apart = (torch_backend.measure_attention(*part, effect, 0.0) for part in (whole, first, rest))
    torch.testing.assert_close(sum(apart), together)
