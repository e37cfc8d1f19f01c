"""What a policy declares: what is computed for it, and what the docs say of it."""

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
        max_sentences: sentence embeddings kept per request; an older sentence keeps its penalty but can
            no longer be found repeated.
        compat: "default", or "published" for the token tables of the method's published code.
    """

    similarity_threshold: float = 0.95
    max_sentences: int = 256
    compat: str = "default"


@dataclass(frozen=True)
class SegmentOptions:
    """What a segment is and how the sparsity of its attention is measured.

    Attributes:
        length: tokens of a segment.
        negligible: share of the largest weight of a query's attention below which another weight counts as zero.
        layers: indices in the model of the layers whose attention is looked at; empty for all.
    """

    length: int = 128
    negligible: float = 0.01
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenScore:
    """Parameters of the operator `score_tokens`; see `ops/batched.py`. The penalty is that of `View`, if needed."""

    pool: int
    mix: float
    redundancy_threshold: float


@dataclass(frozen=True)
class LookaheadPlan:
    """Tokens that are computed ahead for their queries alone, and then forgotten.

    Either the beginning of an answer: decoded greedily from the end of a prompt on a temporary copy of the cache. Or
    the question (`Policy.num_question`): appended to each chunk of a longer prompt that is compacted before its end.
    The policy then sees the cache as if it ended with the question.

    Attributes:
        num_tokens: of the answer, at most; fewer where the model's length ends before. Of a question 0.
        draft: method that compacts the temporary copy; None for a question.
    """

    num_tokens: int = 0
    draft: Policy | None = None


@dataclass(frozen=True)
class About:
    """What `docs/policies.md` says of a method beside what its code says.

    Attributes:
        paper: its name.
        arxiv: number of the paper.
        cost: of a compaction, per layer and kv head.
        departs: where it does something else than its paper.
        training: what must be learned from the model that is served.
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
        name: by which it may be asked for.
        about: its paper.
        reason: why it is not offered.
        instead: what to use.
    """

    name: str
    about: About
    reason: str
    instead: str
