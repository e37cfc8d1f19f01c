"""Declarations of a policy: options of its inputs, and facts for the docs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Policy


@dataclass(frozen=True)
class SentenceOptions:
    """How sentences are found and compared.

    Attributes:
        similarity_threshold: cosine above which the earlier of two sentences counts as repeated.
        max_sentences: sentence embeddings kept per request; older sentences keep their penalty but are no longer
            compared with new ones.
        compat: "default", or "published" for the token tables of the method's published code.
    """

    similarity_threshold: float = 0.95
    max_sentences: int = 256
    compat: str = "default"


@dataclass(frozen=True)
class SegmentOptions:
    """The length of a segment, and how the sparsity of its attention is measured.

    Attributes:
        length: tokens of a segment.
        negligible: share of the largest weight of a query's attention below which another weight counts as zero.
        layers: indices in the model of the layers whose attention is measured; empty for all.
    """

    length: int = 128
    negligible: float = 0.01
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class LookaheadPlan:
    """Tokens that are computed ahead for their queries alone and then discarded.

    They are one of two things. The beginning of an answer is decoded greedily from the end of a prompt, on a temporary
    copy of the cache. The question (`Policy.num_question`) is appended to each chunk of a long prompt that is compacted
    before its end; the policy then sees the cache as if it ended with the question.

    Attributes:
        num_tokens: most tokens of the answer, fewer at the end of the context length; 0 for a question.
        draft: method that compacts the temporary copy; None for a question.
    """

    num_tokens: int = 0
    draft: Policy | None = None


@dataclass(frozen=True)
class About:
    """Facts about a method for `docs/reference/methods.md` that its code does not state.

    Attributes:
        paper: name of the paper's method.
        arxiv: arXiv number of the paper.
        cost: cost of a compaction, per layer and kv head.
        departs: differences from the paper.
        training: what must be trained for the model that is served.
    """

    paper: str = "own"
    arxiv: str = ""
    cost: str = "?"
    departs: str = ""
    training: str = "none"


@dataclass(frozen=True)
class Refusal:
    """A published method that is not offered.

    Attributes:
        name: the name that users may try.
        about: its paper.
        reason: why it is not offered.
        instead: methods to use instead.
    """

    name: str
    about: About
    reason: str
    instead: str
