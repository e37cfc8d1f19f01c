"""`skipkv`: evict first the text that later text repeats (after SkipKV, arXiv 2512.07993, MLSys 2026)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..core.errors import KVPolicyError
from ..core.needs import Need
from .base import (
    About,
    Held,
    Measured,
    Policy,
    SentenceOptions,
    View,
    check_choice,
    check_range,
    register_policy,
)
from .rkv import RKV

COMPAT = ("default", "paper", "published")

SMALLEST_ERROR = 1e-6
"""Lower bound of errors, as a share of their mean. Without it, tokens without attention would stretch the scale."""

POWER = 6
"""Exponent of the repeated share of a sentence: words that recur by chance count almost nothing, a repetition of the
whole sentence counts fully."""

SMALLEST_NOVELTY = 0.05
"""Lower bound of the novelty of a sentence that is repeated as a whole, whose logarithm would be infinite."""

FORMULA_OF_THE_PAPER = ("mix", "pool", "redundancy_threshold", "similarity_threshold", "max_sentences")


@register_policy
@dataclass(frozen=True)
class SkipKV(Policy):
    """The change in recent outputs if the token were left out, minus a penalty if later text repeats its sentence.

    Per layer and kv head, z(...) is a value standardised over the tokens that may be evicted, and R is the share of the
    sentence's tokens that are part of a phrase which later text repeats:

        z(log(output error)) - key_weight * z(cosine of the key with the mean key)
            + sentence_weight * log(1 - R^6) + recent_weight where the token is recent

    The terms are in standard deviations of their head, so the defaults hold for any model, text and budget. The paper's
    rule, eq. 6, is the token score of R-KV minus the cosine between the mean hidden states of a sentence and of the
    later sentence that repeats it; its threshold must be found for each model.

    Attributes:
        recent_share: smallest share of the budget, after the protected prompt, that goes to the newest tokens.
        older_scale: largest number of older tokens, in units of the square root of the budget after the protected
            prompt. With a larger budget, a larger share of it thus goes to the newest tokens.
        recent_weight: weight of the recent tokens.
        decay: factor per 128 tokens by which compactions discount earlier errors.
        key_weight: weight of key similarity.
        sentence_weight: weight of the logarithm of a sentence's novelty.
        compat: "default"; "paper" for the paper's rule with our sentence tables; "published" for the rule and tables of
            its published code. The parameters below belong to these two.
        mix: weight of importance against redundancy, see `RKV`.
        pool: width of the max-pooling of importance, odd.
        redundancy_threshold: key cosine above which the last similar key is exempt.
        similarity_threshold: cosine of two sentence embeddings above which the earlier one is redundant; the paper
            uses 0.95-0.99, tuned per budget.
        max_sentences: see `SentenceOptions`.
    """

    name: ClassVar[str] = "skipkv"
    about: ClassVar[About] = About(
        "SkipKV",
        "2512.07993",
        "O(n G L D) for every n queries, and O(T log T) for T tokens of text",
        "scores by output error, and compares sentences by their words; `compat` gives the paper's rule; see "
        "docs/design/departures-from-papers.md",
    )

    recent_share: float = 0.5
    older_scale: float = 8.0
    recent_weight: float = 3.0
    decay: float = 0.7
    key_weight: float = 0.3
    sentence_weight: float = 2.0
    compat: str = "default"
    mix: float = RKV.mix
    pool: int = RKV.pool
    redundancy_threshold: float = RKV.redundancy_threshold
    similarity_threshold: float = 0.95
    max_sentences: int = 256

    def __post_init__(self) -> None:
        check_choice("compat", self.compat, COMPAT)
        for name in ("recent_share", "decay"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        for name in ("older_scale", "recent_weight", "key_weight", "sentence_weight"):
            check_range(name, getattr(self, name), 0.0, 100.0)
        check_range("similarity_threshold", self.similarity_threshold, 0.0, 1.0)
        check_range("max_sentences", self.max_sentences, 2, 65536)
        self._check_formula()
        RKV(self.mix, self.pool, self.redundancy_threshold)  # checks its parameters

    def _check_formula(self) -> None:
        """Refuse parameters of the formula that is not in use, which would have no effect."""
        of_paper = self.compat != "default"
        for field in dataclasses.fields(self):
            is_set = getattr(self, field.name) != field.default
            if is_set and field.name != "compat" and (field.name in FORMULA_OF_THE_PAPER) != of_paper:
                remedy = "leave it out" if of_paper else 'add "compat": "paper" for the paper\'s rule, or leave it out'
                raise KVPolicyError(
                    f"kv_policy_config: {field.name}={getattr(self, field.name)!r} has no effect with "
                    f"compat={self.compat!r}; {remedy}"
                )

    @property
    def needs(self) -> Need:  # type: ignore[override]
        """Inputs of the rule in use."""
        if self.compat == "default":
            return Need.QUERIES | Need.KEYS | Need.VALUES | Need.SENTENCES | Need.RECURRENCE | Need.OUTPUT_ERROR
        return RKV.needs | Need.SENTENCES | Need.HIDDEN

    @property
    def sentence_options(self) -> SentenceOptions:
        tables = "published" if self.compat == "published" else "default"
        return SentenceOptions(self.similarity_threshold, self.max_sentences, tables)

    @property
    def _rkv(self) -> RKV:
        return RKV(self.mix, self.pool, self.redundancy_threshold)

    def score(self, view: View) -> Tensor:
        assert view.sentence_penalty is not None
        if self.compat != "default":
            return self._rkv.score(view) - view.sentence_penalty
        assert view.output_error is not None
        assert view.keys is not None
        in_window = view.positions >= view.num_logical - view.window
        measured = Measured(
            view.output_error,
            ops.key_similarity(view.keys.transpose(0, 1)),
            view.sentence_penalty,
            view.positions >= view.num_logical - self.num_recent(view.num_keep, view.num_protected),
            ~in_window & (view.positions >= view.num_protected),
        )
        return self.rank(measured)

    def score_batch(self, held: Held) -> Tensor:
        assert held.sentence_penalty is not None
        if self.compat != "default":
            return self._rkv.score_batch(held)  # which subtracts the penalty
        assert held.output_error is not None
        recent_from = [r.num_logical - self.num_recent(r.num_keep, r.num_protected) for r in held.requests]
        measured = Measured(
            held.output_error,
            held.key_similarity(),
            held.sentence_penalty,
            held.positions >= held.column(recent_from),
            held.is_free,
        )
        return self.rank(measured)

    def num_recent(self, num_keep: int, num_protected: int) -> int:
        """Return how many tokens count as recent: the budget after the protected prompt, minus the older tokens."""
        free = max(num_keep - num_protected, 0)
        return int(free - min((1 - self.recent_share) * free, self.older_scale * math.sqrt(free)))

    def rank(self, measured: Measured) -> Tensor:
        """Score tokens of any number of requests, layers and heads at once: float32 `[..., N]`."""
        floor = SMALLEST_ERROR * _mean(measured.output_error, measured.is_free)
        error = measured.output_error.maximum(floor).clamp(min=torch.finfo(torch.float32).tiny)
        worth = _standardised(error.log(), measured.is_free)
        similarity = _standardised(measured.key_similarity, measured.is_free)
        novelty = (1 - measured.repeated**POWER).clamp(min=SMALLEST_NOVELTY).log()
        score = worth - self.key_weight * similarity + self.sentence_weight * novelty
        return score + self.recent_weight * measured.is_recent


def _mean(values: Tensor, counts: Tensor) -> Tensor:
    """Average each row of `[..., N]` over the elements that count, `[..., 1]`."""
    return (values * counts).sum(dim=-1, keepdim=True) / counts.sum(dim=-1, keepdim=True).clamp(min=1)


def _standardised(values: Tensor, counts: Tensor) -> Tensor:
    """Standardise each row of `[..., N]` by the mean and standard deviation of the elements that count."""
    centred = values - _mean(values, counts)
    return centred / _mean(centred.square(), counts).sqrt().clamp(min=ops.EPSILON)
