"""The operators' definitions against loops written from the formulas of the paper, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkv_vllm import ops
from skipkv_vllm.core.errors import KVPolicyError


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    exp = [math.exp(x - top) for x in row]
    return [x / math.fsum(exp) for x in exp]


def brute_importance(queries: Tensor, keys: Tensor, window: int, pool: int) -> Tensor:
    """Eq. 4: logits, maximum over the query heads of a group, softmax over old keys, mean, max-pool."""
    q, k = queries.double().tolist(), keys.double().tolist()
    q_heads, kv_heads, dim = queries.shape[1], keys.shape[1], keys.shape[2]
    group, old = q_heads // kv_heads, len(k) - window
    result = []
    for head in range(kv_heads):
        rows = []
        for w in range(window):
            logits = []
            for token in range(old):
                of_group = [dot(q[w][head * group + g], k[token][head]) / math.sqrt(dim) for g in range(group)]
                logits.append(max(of_group))
            rows.append(softmax(logits))
        mean = [math.fsum(row[token] for row in rows) / window for token in range(old)]
        half = pool // 2
        result.append([max(mean[max(0, i - half) : i + half + 1]) for i in range(old)])
    return torch.tensor(result, dtype=torch.float64)


def brute_received(queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    """Attention of the newest queries, one softmax at a time over the keys of their past."""
    q, k, places = queries.double().tolist(), keys.double().tolist(), positions.tolist()
    (n, q_heads, dim), kv_heads = queries.shape, keys.shape[0]
    group = q_heads // kv_heads
    result = [[0.0] * keys.shape[1] for _ in range(kv_heads)]
    for head in range(kv_heads):
        for i in range(n):
            place = max(places[head]) - n + 1 + i
            seen = [j for j in range(keys.shape[1]) if places[head][j] <= place]
            for g in range(group):
                logits = [dot(q[i][head * group + g], k[head][j]) / math.sqrt(dim) for j in seen]
                for j, weight in zip(seen, softmax(logits), strict=True):
                    result[head][j] += weight / group
    return torch.tensor(result, dtype=torch.float64)


def brute_redundancy(keys: Tensor, threshold: float) -> Tensor:
    """Eq. 5: cosines without the diagonal; in each row the last similar column (or column 0) is zeroed."""
    k, length, kv_heads = keys.double().tolist(), keys.shape[0], keys.shape[1]
    result = []
    for head in range(kv_heads):
        unit = []
        for token in range(length):
            norm = math.sqrt(dot(k[token][head], k[token][head])) + 1e-8
            unit.append([x / norm for x in k[token][head]])
        cosine = [[0.0 if i == j else dot(unit[i], unit[j]) for j in range(length)] for i in range(length)]
        for i in range(length):
            similar = [j for j in range(length) if cosine[i][j] > threshold]
            cosine[i][similar[-1] if similar else 0] = 0.0
        result.append(softmax([math.fsum(cosine[i][j] for i in range(length)) / length for j in range(length)]))
    return torch.tensor(result, dtype=torch.float64)


def nearest_to_threshold(keys: Tensor, threshold: float) -> float:
    """Return the distance of the closest cosine from the threshold: rounding must not decide a test."""
    unit = torch.nn.functional.normalize(keys.double(), dim=-1).transpose(0, 1)
    return float((unit @ unit.transpose(1, 2) - threshold).abs().min())


def brute_penalties(embeddings: Tensor, exists: list[bool], threshold: float, rule: str) -> list[float]:
    """Eqs. 1 and 3: sentence i is flagged by a later j with cosine above the threshold."""
    e = embeddings.double().tolist()
    result = []
    for i in range(len(e)):
        found = [
            dot(e[i], e[j]) for j in range(i + 1, len(e)) if exists[i] and exists[j] and dot(e[i], e[j]) > threshold
        ]
        result.append(0.0 if not found else max(found) if rule == "max" else found[-1])
    return result


SHAPES = [
    # L, W, Hkv, group, D
    (2, 1, 1, 1, 8),
    (9, 8, 1, 1, 16),
    (20, 8, 2, 1, 32),
    (33, 8, 1, 8, 8),
    (40, 4, 4, 2, 64),
    (17, 2, 8, 3, 16),
    (24, 8, 2, 4, 128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "window", "heads", "group", "dim"), SHAPES)
def test_importance_equals_the_token_loop(length, window, heads, group, dim, dtype):
    generator = torch.Generator().manual_seed(length * 1000 + dim)
    queries = torch.randn(window, heads * group, dim, generator=generator).to(dtype)
    keys = torch.randn(length, heads, dim, generator=generator).to(dtype)
    got = ops.importance(queries, keys, window=window, pool=7)
    assert got.dtype == torch.float32
    assert got.shape == (heads, length - window)
    torch.testing.assert_close(got.double(), brute_importance(queries, keys, window, 7), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", [1, 3, 7, 63])
def test_importance_pools_over_neighbours_of_any_width(pool):
    generator = torch.Generator().manual_seed(pool)
    queries, keys = torch.randn(8, 4, 16, generator=generator) * 3, torch.randn(30, 2, 16, generator=generator)
    got = ops.importance(queries, keys, window=8, pool=pool)
    torch.testing.assert_close(got.double(), brute_importance(queries, keys, 8, pool), rtol=1e-4, atol=1e-6)


def test_importance_takes_the_maximum_of_the_group_before_the_softmax():
    # Two query heads that attend to different keys. One kv head, D = 1, no pooling.
    queries = torch.tensor([[[2.0], [-2.0]]])
    keys = torch.tensor([[[1.0]], [[-1.0]], [[0.0]], [[9.0]]])
    # Group maxima of the logits are 2, 2, 0; softmax over them. A maximum after it would give 0.867, 0.867.
    e2 = math.exp(2.0)
    expected = torch.tensor([[e2, e2, 1.0]]) / (2 * e2 + 1)
    torch.testing.assert_close(ops.importance(queries, keys, window=1, pool=1), expected)


def test_importance_of_equal_keys_is_uniform():
    queries, keys = torch.randn(4, 8, 16), torch.ones(12, 2, 16)
    torch.testing.assert_close(ops.importance(queries, keys, window=4, pool=7), torch.full((2, 8), 1 / 8))


def test_importance_does_not_look_at_the_window_keys():
    queries, keys = torch.randn(4, 4, 8), torch.randn(12, 2, 8)
    changed = keys.clone()
    changed[-4:] = 100.0
    assert torch.equal(
        ops.importance(queries, keys, window=4, pool=7), ops.importance(queries, changed, window=4, pool=7)
    )


def test_importance_of_the_smallest_possible_cache():
    # L = W + 1: a single old key takes all of the attention.
    assert torch.equal(ops.importance(torch.randn(8, 4, 16), torch.randn(9, 2, 16), window=8, pool=7), torch.ones(2, 1))


def test_importance_survives_huge_logits():
    queries, keys = torch.full((2, 1, 8), 1e4), torch.zeros(5, 1, 8)
    keys[1] = 1e4
    assert ops.importance(queries, keys, window=2, pool=1).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [
        ((4, 4, 16), (20, 2, 16), 8),  # not W queries
        ((8, 4, 16), (20, 2, 32), 8),  # another head size
        ((8, 3, 16), (20, 2, 16), 8),  # not a multiple of the kv heads
        ((8, 4, 16), (8, 2, 16), 8),  # nothing older than the window
        ((8, 4, 16), (5, 2, 16), 8),
    ],
)
def test_importance_refuses_shapes_that_do_not_fit(queries, keys, window):
    with pytest.raises(KVPolicyError) as error:
        ops.importance(torch.zeros(queries), torch.zeros(keys), window=window, pool=7)
    for part in (str(queries), str(keys), f"window={window}", "[W, Hq, D]"):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("length", "heads", "dim"), [(1, 1, 8), (2, 2, 8), (9, 1, 16), (24, 8, 8), (31, 2, 64), (16, 4, 128)]
)
def test_redundancy_equals_the_token_loop(length, heads, dim, dtype):
    generator = torch.Generator().manual_seed(length * 7 + dim)
    # A common direction makes many keys similar, so that the exemption matters.
    common = torch.randn(1, heads, dim, generator=generator)
    keys = (torch.randn(length, heads, dim, generator=generator) + common).to(dtype)
    assert nearest_to_threshold(keys, 0.5) > 1e-6
    got = ops.redundancy(keys, threshold=0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), brute_redundancy(keys, 0.5), rtol=1e-4, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=8, max_size=8), min_size=1, max_size=10),
    # No cosine of such vectors (a / sqrt(b c), |a|, b, c <= 8) comes near these.
    threshold=st.sampled_from([-0.51, 0.1, 0.49, 0.51, 0.93]),
)
def test_redundancy_of_small_integer_keys(rows, threshold):
    # Equal, opposite, orthogonal and zero keys in every mixture.
    keys = torch.tensor(rows, dtype=torch.float32).unsqueeze(1)
    torch.testing.assert_close(
        ops.redundancy(keys, threshold=threshold).double(), brute_redundancy(keys, threshold), rtol=1e-4, atol=1e-7
    )


def test_redundancy_spares_the_newest_of_equal_keys():
    # Keys a, a, b, a with a orthogonal to b. Similar columns by row: {1,3}, {0,3}, none, {0,1}; the last one
    # of each row and column 0 of row 2 are zeroed. Column sums: 0 (rows 1, 3): 2; 1: (rows 0, 3) -> 1, as row 3
    # zeroes it; 2: 0; 3: zeroed in rows 0 and 1 -> 0.
    a, b = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([[a], [a], [b], [a]])
    expected = torch.tensor([[2.0, 1.0, 0.0, 0.0]]) / 4
    torch.testing.assert_close(ops.redundancy(keys, threshold=0.5), expected.softmax(-1))


def test_redundancy_zeroes_column_0_where_nothing_is_similar():
    # Cosine 0.3 everywhere: nothing above 0.5, so every row loses its entry of column 0 and only column 0 is spared.
    c = 0.3
    gram = torch.full((3, 3), c) + torch.eye(3) * (1 - c)
    keys = torch.linalg.cholesky(gram).unsqueeze(1)
    expected = torch.tensor([[0.0, 2 * c, 2 * c]]) / 3
    torch.testing.assert_close(ops.redundancy(keys, threshold=0.5), expected.softmax(-1), rtol=1e-5, atol=1e-6)


def test_redundancy_threshold_is_strict():
    # Not above 0.5: column 0 goes in both rows. Above 0.49: each row loses its only entry.
    keys = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]])  # cosine exactly 0.5
    torch.testing.assert_close(ops.redundancy(keys, threshold=0.5), torch.tensor([[0.0, 0.25]]).softmax(-1))
    torch.testing.assert_close(ops.redundancy(keys, threshold=0.49), torch.tensor([[0.0, 0.0]]).softmax(-1))


def test_redundancy_of_zero_keys_is_uniform():
    torch.testing.assert_close(ops.redundancy(torch.zeros(5, 2, 8), threshold=0.5), torch.full((2, 5), 0.2))


def test_redundancy_ignores_key_length():
    keys = torch.randn(12, 2, 16)
    scaled = keys * torch.rand(12, 2, 1).add(0.5)
    torch.testing.assert_close(ops.redundancy(keys, threshold=0.5), ops.redundancy(scaled, threshold=0.5))


def test_redundancy_leaves_its_input_alone():
    keys = torch.randn(6, 2, 8)
    before = keys.clone()
    ops.redundancy(keys, threshold=0.5)
    assert torch.equal(keys, before)


@pytest.mark.parametrize("rule", ["max", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_penalties_equal_the_pair_loop(seed, dtype, rule):
    generator = torch.Generator().manual_seed(seed)
    topics = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    topic = torch.randint(0, 3, (20,), generator=generator)
    embeddings = topics[topic] + 0.1 * torch.randn(20, 16, generator=generator)
    embeddings = torch.nn.functional.normalize(embeddings, dim=-1).to(dtype)
    exists = torch.rand(20, generator=generator) > 0.2
    threshold = 0.85
    expected = brute_penalties(embeddings, exists.tolist(), threshold, rule)
    assert any(expected), "the example must flag a sentence"
    got = ops.sentence_penalties(embeddings, exists, threshold=threshold, rule=rule)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_penalties_mark_the_earlier_and_keep_the_later():
    a, b = [1.0, 0.0], [0.0, 1.0]
    got = ops.sentence_penalties(torch.tensor([a, b, a]), torch.ones(3, dtype=torch.bool), threshold=0.95)
    assert got.tolist() == [1.0, 0.0, 0.0]


def test_penalty_of_several_repeats_is_the_highest_or_the_last():
    rows = torch.tensor([[1.0, 0.0], [0.96, 0.28], [0.8, 0.6]])
    exists = torch.ones(3, dtype=torch.bool)
    highest = ops.sentence_penalties(rows, exists, threshold=0.5)
    latest = ops.sentence_penalties(rows, exists, threshold=0.5, rule="last")
    # cosines: 0-1 0.96, 0-2 0.8, 1-2 0.936
    torch.testing.assert_close(highest, torch.tensor([0.96, 0.936, 0.0]))
    torch.testing.assert_close(latest, torch.tensor([0.8, 0.936, 0.0]))


def test_penalty_threshold_is_strict():
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5]])
    exists = torch.ones(2, dtype=torch.bool)
    assert ops.sentence_penalties(rows, exists, threshold=0.5).tolist() == [0.0, 0.0]
    assert ops.sentence_penalties(rows, exists, threshold=0.49).tolist() == [0.5, 0.0]


def test_rows_without_a_sentence_neither_flag_nor_are_flagged():
    rows, exists = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([True, True, False])
    assert ops.sentence_penalties(rows, exists, threshold=0.9).tolist() == [1.0, 0.0, 0.0]
    assert ops.sentence_penalties(rows, torch.tensor([False, True, False]), threshold=0.9).tolist() == [0.0] * 3


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    length=st.integers(5, 12),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_attention_received_is_the_definition_in_any_slot_order(seed, n, length, kv_heads, group):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, kv_heads * group, 4, generator=generator)
    keys = torch.randn(kv_heads, length, 4, generator=generator)
    # Every head holds its own tokens in its own order; all hold the newest n.
    rows = []
    for _ in range(kv_heads):
        old = torch.randperm(30, generator=generator)[: length - n]
        row = torch.cat([old, torch.arange(30, 30 + n)])
        rows.append(row[torch.randperm(length, generator=generator)])
    positions = torch.stack(rows).int()
    received = ops.attention_received(queries, keys, positions)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.double(), brute_received(queries, keys, positions), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(received.sum(-1), torch.full((kv_heads,), float(n)))


@pytest.mark.parametrize(
    ("queries", "keys", "positions"),
    [
        ((2, 4, 8), (3, 9, 8), (3, 9)),
        ((2, 4, 8), (2, 9, 16), (2, 9)),
        ((2, 4, 8), (2, 9, 8), (2, 8)),
        ((9, 4, 8), (2, 8, 8), (2, 8)),
    ],
)
def test_attention_received_refuses_shapes_that_do_not_fit(queries, keys, positions):
    with pytest.raises(KVPolicyError, match="attention_logits"):
        ops.attention_received(torch.zeros(queries), torch.zeros(keys), torch.zeros(positions, dtype=torch.int32))
