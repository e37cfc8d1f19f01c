"""Token scores of every method, for all layers and heads: `[layers, heads, held]`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import formulas
from tests.reference.scores import random_scores, rkv_scores, snapkv_scores
from tests.reference.sentences import repeated_shares, sentence_penalties
from tests.reference.state import State

H2O_RECENT_SHARE = 0.5


def token_scores(state: State) -> Tensor:
    """Score of each held token, `[layers, heads, held]`."""
    method = state.settings.method
    if state.by_segment is not None:
        return _thinkv(state, **state.by_segment)
    if method == "skipkv":
        return _skipkv(state) if state.settings.by_error else _skipkv_of_the_paper(state)
    return METHODS.get(method, _by_formula)(state)


def _streaming_llm(state: State) -> Tensor:
    return state.positions.float()


def _random(state: State) -> Tensor:
    return random_scores(state.positions, state.num_computed, state.model.full)


def _h2o(state: State) -> Tensor:
    recent = int(H2O_RECENT_SHARE * state.keep)
    is_recent = state.positions >= state.num_computed - recent
    # For single tokens any number above the masses will do; a small one leaves near ties near.
    above = 1e6 if state.settings.granularity == "sentence" else float(state.mass.max()) + 1
    return torch.where(is_recent, state.positions + above, state.mass)


def _snapkv(state: State) -> Tensor:
    return torch.stack([snapkv_scores(q, layer.keys[0]) for q, layer in zip(state.queries, state.layers, strict=True)])


def _rkv(state: State) -> Tensor:
    return torch.stack([rkv_scores(q, layer.keys[0]) for q, layer in zip(state.queries, state.layers, strict=True)])


def _skipkv_of_the_paper(state: State) -> Tensor:
    sentences = state.sentences()
    penalties = torch.zeros(state.num_computed)
    for sentence, penalty in zip(sentences, sentence_penalties(sentences, state.hidden), strict=True):
        penalties[sentence.start : sentence.end] = penalty
    return _rkv(state) - penalties[state.positions]


def _skipkv(state: State) -> Tensor:
    is_recent = state.positions >= state.num_computed - formulas.num_recent(state.keep, state.num_protected)
    free = ~state.pinned()
    sentences = state.sentences()
    share = torch.zeros(state.num_computed)
    shares = repeated_shares(state.text[: state.num_computed], state.num_protected, sentences)
    for sentence, repeated in zip(sentences, shares, strict=True):
        share[sentence.start : sentence.end] = repeated
    scores = torch.zeros(state.positions.shape)
    for _, keys, place in state.heads():
        chosen = free[place]
        error = state.errors[place] / state.num_seen[place].clamp(min=1)
        worth = error.clamp(min=max(1e-6 * float(error[chosen].mean()), 1e-37)).log()
        unit = F.normalize(keys, dim=-1)
        alike = F.cosine_similarity(unit, unit.mean(dim=0, keepdim=True), dim=-1)
        novelty = (1 - share[state.positions[place]] ** formulas.POWER).clamp(min=0.05).log()
        worth, alike = ((x - x[chosen].mean()) / x[chosen].std(correction=0).clamp(min=1e-8) for x in (worth, alike))
        scores[place] = worth - formulas.KEY_WEIGHT * alike + formulas.SENTENCE_WEIGHT * novelty
    return scores + formulas.RECENT_WEIGHT * is_recent


def _trimkv(state: State) -> Tensor:
    both = zip(state.log_betas.flatten(0, 1).tolist(), state.positions.flatten(0, 1).tolist(), strict=True)
    return torch.tensor([formulas.trimkv(*row) for row in both]).view(state.positions.shape)


def _finch(state: State) -> Tensor:
    settings = state.settings
    scores, in_prompt = torch.zeros(state.positions.shape), state.num_computed <= state.num_prompt
    cache, asking = state.cache, state.queries
    if settings.ask_chunks and state.num_computed < state.num_prompt:
        # The same cache with the question behind it.
        cache = state.copy(torch.ones(state.positions.shape, dtype=torch.bool))
        question = state.text[state.num_prompt - settings.num_question : state.num_prompt]
        _, _, asking = state.model.forward(question, state.num_computed, cache)
    for i, layer in enumerate(state.model.full_layers(cache)):
        queries = asking[i].unflatten(0, (layer.keys.shape[1], -1)).transpose(1, 2)  # [heads, W, group, D]
        queries = queries[:, -settings.num_question :] if in_prompt else queries
        for head in range(len(queries)):
            found = formulas.finch(queries[head], layer.keys[0, head])
            scores[i, head] = torch.tensor(found[: scores.shape[2]])
    return scores


def _laq(state: State) -> Tensor:
    settings = state.settings
    if state.num_computed != state.num_prompt or not settings.lookahead:
        return _snapkv(state)
    scores, draft = torch.zeros(state.positions.shape), _draft_queries(state)
    for i, layer in enumerate(state.layers):
        heads = layer.keys.shape[1]
        drafted, last = (q[i].unflatten(0, (heads, -1)).transpose(1, 2) for q in (draft, state.queries))
        for head in range(heads):
            asking = last[head] if settings.with_window else last[head, :0]
            scores[i, head] = torch.tensor(formulas.laq(drafted[head], asking, layer.keys[0, head], settings.window))
    return scores


def _draft_queries(state: State) -> Tensor:
    """Post-RoPE queries `[layers, Hq, n, D]` of a draft answer, decoded on a cache that SnapKV has compacted."""
    survives, _ = state.select(_snapkv(state))
    cache, logits, found = state.copy(survives), state.logits, []
    for i in range(state.settings.lookahead):
        logits, _, queries = state.model.forward([int(logits.argmax())], state.num_computed + i, cache)
        found.append(queries)
    return torch.cat(found, dim=2)


def _thinkv(state: State, segment: int, transition_above: float, execution_below: float, **_: Any) -> Tensor:
    first, end = state.num_protected, state.num_computed - state.settings.window
    sizes = [min(segment, end - start) for start in range(first, end, segment)]
    num_free = state.keep - first - state.settings.window
    bounds = transition_above, execution_below
    quota, order, state.shrinks = formulas.quotas(state.sparsities, state.shrinks, sizes, num_free, *bounds)
    scores = torch.zeros(state.positions.shape)
    for _, keys, place in state.heads():
        held = state.positions[place].tolist()
        numbers = [(position - first) // segment if first <= position < end else None for position in held]
        scores[place] = torch.tensor(formulas.thinkv(keys, numbers, quota, order))
    return scores


def _by_formula(state: State) -> Tensor:
    """Score one head at a time by the formula of the method."""
    scores = torch.zeros(state.positions.shape)
    for queries, keys, (layer, head) in state.heads():
        held = queries, keys, state.layers[layer].values[0, head], state.mass[layer, head]
        scores[layer, head] = torch.tensor(formulas.score(state.settings.method, {}, *held))
    return scores


METHODS = {
    "streaming_llm": _streaming_llm,
    "random": _random,
    "h2o": _h2o,
    "snapkv": _snapkv,
    "rkv": _rkv,
    "trimkv": _trimkv,
    "finch": _finch,
    "laq": _laq,
}
