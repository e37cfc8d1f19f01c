"""`skipkv`: sentences that a later sentence repeats leave first (SkipKV, arXiv 2512.07993, MLSys 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import KVPolicyError
from .base import About, Need, SentenceOptions, TokenScore, View, check_range, register_policy
from .rkv import RKV


@register_policy
@dataclass(frozen=True)
class SkipKV(RKV):
    """The token score of R-KV minus the similarity of a repeated sentence, eq. 6.

    Token scores are of order 1/L and the similarity is at least `similarity_threshold`, so tokens of
    repeated sentences go first and token scores decide among the rest.

    Attributes:
        similarity_threshold: cosine of two sentence embeddings above which the earlier one is redundant.
            The paper uses 0.95-0.99, tuned per budget.
        max_sentences: see `SentenceOptions`.
        compat: "default", or "reference" for the token tables and the penalty rule of the published code.
    """

    name: ClassVar[str] = "skipkv"
    about: ClassVar[About] = About(
        "SkipKV",
        "2512.07993",
        "as rkv, and O(S) cosines for each new sentence of S held ones",
        'see docs/architecture.md, "Where we depart from the paper"',
    )
    needs: ClassVar[Need] = RKV.needs | Need.SENTENCES | Need.HIDDEN

    similarity_threshold: float = 0.95
    max_sentences: int = 256
    compat: str = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("similarity_threshold", self.similarity_threshold, 0.0, 1.0)
        check_range("max_sentences", self.max_sentences, 2, 65536)
        if self.compat not in ("default", "reference"):
            raise KVPolicyError(f"kv_policy_config: compat={self.compat!r} must be 'default' or 'reference'")

    @property
    def sentence_options(self) -> SentenceOptions:
        return SentenceOptions(self.similarity_threshold, self.max_sentences, self.compat)

    @property
    def token_score(self) -> TokenScore:
        return super().token_score  # the operator subtracts the penalty

    def score(self, view: View) -> Tensor:
        assert view.sentence_penalty is not None
        return super().score(view) - view.sentence_penalty
