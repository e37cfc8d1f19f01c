"""Scores of published eviction methods, from their formulas, for one kv head, token by token, in double precision.

Nothing is shared with the package. `queries` `[W, G, D]` are the newest W of the head's G query heads, oldest first;
`keys` and `values` `[N, D]` are the held tokens by ascending position; `mass` `[N]` is the attention received so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

POOL = 7
KEY_WEIGHT, SENTENCE_WEIGHT, RECENT_WEIGHT, POWER = 0.3, 2, 3, 6  # of `skipkv`


def attention(query: Tensor, keys: Tensor, num_seen: int) -> list[float]:
    """Softmax of one query head `[D]` over the first `num_seen` tokens; 0 beyond."""
    logits = [float(query @ key) / math.sqrt(len(query)) for key in keys[:num_seen]]
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [w / sum(weights) for w in weights] + [0.0] * (len(keys) - num_seen)


def mean_attention(queries: Tensor, keys: Tensor) -> list[float]:
    """Attention of the queries, averaged over them and the query heads."""
    rows = [
        attention(query, keys, len(keys) - len(queries) + w + 1) for w, heads in enumerate(queries) for query in heads
    ]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def pooled(scores: list[float], window: int) -> list[float]:
    """Maximum over neighbours, of the tokens before the window; 0 for the window's."""
    old, reach = scores[: len(scores) - window], POOL // 2
    return [max(old[max(0, i - reach) : i + reach + 1]) for i in range(len(old))] + [0.0] * window


def obcache(form: str, queries: Tensor, keys: Tensor, values: Tensor) -> list[float]:
    """Second-order change of the output when a token's value, key or both are pruned."""
    total = [0.0] * len(keys)
    for w, heads in enumerate(queries):
        num_seen = len(keys) - len(queries) + w + 1
        for query in heads:
            weights = attention(query, keys, num_seen)
            output = sum(a * v for a, v in zip(weights, values, strict=True))
            for i in range(num_seen):
                z, v, a = float(query @ keys[i]) / math.sqrt(len(query)), values[i], weights[i]
                of_value, of_key = a * v, a * z * (v - output)
                change = {"value": of_value, "key": of_key, "joint": of_value + of_key}[form]
                total[i] += float(change @ change) / queries.shape[1]
    return pooled(total, len(queries))


def caote(form: str, weights: list[float], values: Tensor) -> list[float]:
    """Distance of the output with and without each token, which takes its weight along."""
    output = sum(a * v for a, v in zip(weights, values, strict=True)) if form == "exact" else values.mean(0)
    return [a / (1 - a) * float((output - v).norm()) for a, v in zip(weights, values, strict=True)]


def num_recent(budget: int, protected: int) -> int:
    """How many of the newest tokens `skipkv` takes for recent."""
    left = budget - protected
    return int(left - min(left / 2, 8 * math.sqrt(left)))


def skipkv(
    errors: list[float], keys: Tensor, repeated: list[float], positions: list[int], free: range, recent: int
) -> list[float]:
    """Logarithm of the error, less for keys like the others and for sentences said again, more for recent tokens.

    `repeated` is the share of each token's sentence that is said again; tokens at positions in `free` may leave, those
    from `recent` on are recent.
    """
    unit = [key.double() / key.double().norm() for key in keys]
    mean = sum(unit) / len(unit)
    alike = [float(u @ mean / mean.norm()) for u in unit]
    chosen = [i for i, position in enumerate(positions) if position in free]
    floor = max(1e-6 * sum(errors[i] for i in chosen) / max(len(chosen), 1), torch.finfo(torch.float32).tiny)
    worth = [math.log(max(error, floor)) for error in errors]

    def standardised(values: list[float]) -> list[float]:
        average = sum(values[i] for i in chosen) / max(len(chosen), 1)
        deviation = math.sqrt(sum((values[i] - average) ** 2 for i in chosen) / max(len(chosen), 1))
        return [(value - average) / max(deviation, 1e-8) for value in values]

    return [
        w - KEY_WEIGHT * a + SENTENCE_WEIGHT * math.log(max(1 - share**POWER, 0.05)) + RECENT_WEIGHT * (place >= recent)
        for w, a, share, place in zip(standardised(worth), standardised(alike), repeated, positions, strict=True)
    ]


def log_beta(gate: Sequence[Tensor], hidden: Tensor) -> list[float]:
    """What a gate (W1, b1, W2, b2) with SiLU says of one token `[E]`, by kv head."""
    weight1, bias1, weight2, bias2 = (tensor.double() for tensor in gate)
    inner = [float(row @ hidden.double() + bias) for row, bias in zip(weight1, bias1, strict=True)]
    inner = [x / (1 + math.exp(-x)) for x in inner]
    logits = [sum(w * x for w, x in zip(row, inner, strict=True)) for row in weight2.tolist()]
    return [-math.log1p(math.exp(-logit - float(bias))) for logit, bias in zip(logits, bias2, strict=True)]


def trimkv(betas: Sequence[float], positions: Sequence[int]) -> list[float]:
    """Logarithm of what is left of each token for the query after the newest one."""
    return [(positions[-1] + 1 - p) * beta for p, beta in zip(positions, betas, strict=True)]


def finch(queries: Tensor, keys: Tensor) -> list[float]:
    """Attention of the queries times the number of tokens that each sees, averaged over them and the query heads."""
    total = [0.0] * len(keys)
    for w, heads in enumerate(queries.double()):
        num_seen = len(keys) - len(queries) + w + 1
        for query in heads:
            for i, weight in enumerate(attention(query, keys.double(), num_seen)):
                total[i] += weight * num_seen / queries.shape[:2].numel()
    return total


def laq(drafted: Tensor, last: Tensor, keys: Tensor, window: int) -> list[float]:
    """Attention of queries `[n, G, D]` after all tokens and of their `last`, summed, averaged over the query heads."""
    total = [0.0] * len(keys)
    for queries, num_before in ((drafted, len(keys)), (last, len(keys) - len(last) + 1)):
        for w, heads in enumerate(queries.double()):
            for query in heads:
                for i, weight in enumerate(attention(query, keys.double(), min(num_before + w, len(keys)))):
                    total[i] += weight / len(heads)
    return pooled(total, window)


def score(
    method: str, options: dict[str, object], queries: Tensor, keys: Tensor, values: Tensor, mass: Tensor
) -> list[float]:
    """Score of every held token; `options` are those that differ from the method's defaults."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    if method == "knorm":
        return [-math.sqrt(float(key @ key)) for key in keys]
    if method == "keydiff":
        unit = [key / key.norm() for key in keys]
        anchor = sum(unit) / len(unit)
        return [-float(u @ anchor / anchor.norm()) for u in unit]
    if method == "manifoldkv":
        size = int(options.get("centroid_window", 0)) or len(keys)
        centres = [keys[i : i + size].mean(0) for i in range(0, len(keys), size)]
        return [float((key - centres[i // size]).norm()) for i, key in enumerate(keys)]
    if method == "obcache":
        return obcache(str(options.get("form", "joint")), queries, keys, values)
    base = str(options.get("base", {"tova": "tova", "longflow": "tova", "vatp": "h2o"}.get(method, "snapkv")))
    if base == "h2o":
        weights = (mass.double() / mass.double().sum()).tolist()
    else:
        weights = mean_attention(queries[-1:] if base == "tova" else queries, keys)
    if method == "tova":
        return weights
    if method in ("vatp", "longflow"):
        return [a * float(v.abs().sum()) for a, v in zip(weights, values, strict=True)]
    if method == "caote":
        return caote(str(options.get("form", "exact")), weights, values)
    raise ValueError(method)


# ---- ThinKV

LADDER = (64, 32, 16, 8, 4)
KINDS = ("transition", "execution", "reasoning", "unfinished")  # the least important first
ROUNDS = 5


def sparsity(queries: Tensor, keys: Tensor) -> float:
    """Share of a kv head's attention weights below a hundredth of the largest of their row."""
    shares = []
    for w, heads in enumerate(queries.double()):
        num_seen = len(keys) - len(queries) + w + 1
        for query in heads:
            weights = attention(query, keys.double(), num_seen)[:num_seen]
            shares.append(sum(weight < 0.01 * max(weights) for weight in weights) / num_seen)
    return sum(shares) / len(shares)


def quotas(
    sparsities: list[float], memory: list[int], sizes: list[int], num_free: int, above: float, below: float
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of each segment that may stay, the order in which segments shrink, and the steps taken for want of room.

    `sparsities` and `memory` are of the segments that are written or known; others are unfinished and new.
    """
    kinds = ["transition" if s > above else "execution" if s < below else "reasoning" for s in sparsities]
    kinds = kinds[: len(sizes)] + ["unfinished"] * (len(sizes) - len(kinds))
    memory = memory[: len(sizes)] + [0] * (len(sizes) - len(memory))
    levels = [min(5, memory[i] + kinds[i + 1 :].count("transition")) for i in range(len(sizes))]

    def held(i: int, level: int) -> int:
        return min(sizes[i], LADDER[level - 1]) if level else sizes[i]

    order = sorted(range(len(sizes)), key=lambda i: (KINDS.index(kinds[i]), i))
    while sum(held(i, levels[i]) for i in range(len(sizes))) > num_free:
        shrinking = [i for i in order if held(i, 5) < held(i, levels[i])]
        if not shrinking:
            break
        i, before = shrinking[0], levels[shrinking[0]]
        levels[i] = next(level for level in range(before + 1, 6) if held(i, level) < held(i, before))
        memory[i] += levels[i] - before
    memory = [0 if kind == "unfinished" else steps for kind, steps in zip(kinds, memory, strict=True)]
    return [held(i, levels[i]) for i in range(len(sizes))], order, memory


def _first_least(values: list[float]) -> int:
    return values.index(min(values))


def central(keys: Tensor, wanted: int) -> list[int]:
    """Of the clusters that K-means finds, started from evenly spread tokens, the token nearest to each centroid."""
    if len(keys) <= wanted:
        return list(range(len(keys)))
    keys = keys.double()
    centroids = [keys[(2 * j + 1) * len(keys) // (2 * wanted)] for j in range(wanted)]

    def distances(key: Tensor) -> list[float]:
        return [float((key - centroid).norm()) for centroid in centroids]

    for _ in range(ROUNDS):
        nearest = [_first_least(distances(key)) for key in keys]
        for j in range(wanted):
            members = [key for key, cluster in zip(keys, nearest, strict=True) if cluster == j]
            centroids[j] = sum(members) / len(members) if members else centroids[j]
    table = [distances(key) for key in keys]
    nearest = [_first_least(row) for row in table]
    clusters = [[i for i in range(len(keys)) if nearest[i] == j] for j in range(wanted)]
    # Both members of a cluster of two are equally far from its centroid; the earlier counts as nearer.
    near = [min(table[i][j] for i in members) * (1 + 1e-4) if members else 0 for j, members in enumerate(clusters)]
    return [next(i for i in members if table[i][j] <= near[j]) for j, members in enumerate(clusters) if members]


def thinkv(keys: Tensor, segments: list[int | None], quota: list[int], order: list[int]) -> list[float]:
    """Score of every held token of a kv head: central ones by the rank of their segment, the others by age.

    `segments` has the number of each token's segment, None for tokens of none.
    """
    scores = [i / len(keys) for i in range(len(keys))]
    for number, wanted in enumerate(quota):
        members = [i for i, segment in enumerate(segments) if segment == number]
        for i in central(keys[members], wanted) if members else []:
            scores[members[i]] = 1.0 + order.index(number)
    return scores
