"""What a policy is: a frozen dataclass of hyper-parameters with a score for every held token."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..core.errors import KVPolicyError
from ..core.needs import Need

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The S segments of a request's text behind the protected prompt and before the window; the same for all layers.

    Attributes:
        sparsity: float32 `[S]`, share of the attention weights of a segment's last queries that count as zero, averaged
            over heads and the layers chosen; -1 where a segment is still being written.
        memory: int64 `[S]`, what the method noted of each segment at the last compaction; 0 for new ones.
        sizes: int64 `[S]`, tokens written of each.
        num_free: tokens of them all that a head may keep.
        longest: tokens of a whole segment.
    """

    sparsity: Tensor
    memory: Tensor
    sizes: Tensor
    num_free: int
    longest: int


@dataclass(frozen=True)
class View:
    """What a policy sees of one request in one layer. L held tokens, H kv heads, in ascending position.

    Attributes:
        positions: logical positions `[H, L]`, int32.
        window: W, the number of newest tokens, which always survive.
        num_keep: tokens that will be kept of each head.
        num_logical: tokens computed so far; the newest held one has position `num_logical - 1`.
        num_prompt: length of the prompt.
        num_protected: first tokens that always stay: of a protected prompt its length, else 0.
        layer: index of the layer in the model.
        first_head: index in the model of the first of these kv heads; others may be on other ranks.
        keys: post-RoPE keys `[L, H, D]`, or None unless `Need.KEYS`.
        values: `[L, H, D]`, or None unless `Need.VALUES`.
        queries: the last W post-RoPE queries `[W, Hq, D]`, oldest first, or None unless `Need.QUERIES`.
        sentence_penalty: `[H, L]` float32, 0 to 1: with `Need.HIDDEN` the similarity to the later sentence that repeats
            a token's sentence, and 0 elsewhere; with `Need.RECURRENCE` the share of the sentence's tokens that later
            text repeats; else None.
        attention_mass: `[H, L]` float32, sum over all queries since the end of the prompt (its last token's
            included) of the attention paid to the token, averaged over the query heads of the kv head; or
            None unless `Need.ATTENTION_MASS`.
        output_error: `[H, L]` float32, mean of `A^2 |v - o|^2` over the queries that saw the token, older ones
            discounted by `Policy.decay`; see `ops.output_error`. None unless `Need.OUTPUT_ERROR`, and in the engine,
            which calls `Policy.rank` instead of `score`.
        segment: int64 `[H, L]`, number of each token's segment, -1 in the protected prompt and S in the window; or None
            unless `Need.SEGMENTS`.
        segments: what is known of the segments, with what `Policy.remember` just noted; or None likewise.
        gates: `[H, L]` float32, what the learned gates said of the token when it was written (`log beta`, not
            above 0), or None unless `Need.GATES`.
        lookahead_queries: post-RoPE queries `[n, Hq, D]` of the beginning of an answer (see `LookaheadPlan`), which see
            all held tokens; None but at the end of a prompt, and where no pages were free for them.
    """

    positions: Tensor
    window: int
    num_keep: int = 0
    num_logical: int = 0
    num_prompt: int = 0
    num_protected: int = 0
    layer: int = 0
    first_head: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Tensor | None = None
    sentence_penalty: Tensor | None = None
    attention_mass: Tensor | None = None
    output_error: Tensor | None = None
    segment: Tensor | None = None
    segments: Segments | None = None
    gates: Tensor | None = None
    lookahead_queries: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """What is measured of held tokens, by rows of any number of requests, layers and heads; all of shape `[..., N]`.

    Attributes:
        output_error: float32, see `View`.
        key_similarity: float32, cosine of the key with the mean of its row's unit keys.
        repeated: float32, share of the tokens of the token's sentence that later text repeats.
        is_recent: bool, whether the token is one of the `Policy.num_recent` newest.
        is_free: bool, whether it may leave; False for protected tokens, the window, and where there is no token.
    """

    output_error: Tensor
    key_similarity: Tensor
    repeated: Tensor
    is_recent: Tensor
    is_free: Tensor


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
    """Facts about a method for `docs/reference/methods.md` that its code does not state.

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
class Policy(ABC):
    """An eviction method. Subclasses are frozen dataclasses whose fields are its hyper-parameters."""

    name: ClassVar[str]
    about: ClassVar[About] = About()
    needs: ClassVar[Need] = Need.NOTHING
    compacts_prompt: ClassVar[bool] = False
    """whether a prompt longer than the budget is compacted as soon as it is computed, not only at the bound; such a
    method is about the prompt, which then must not be protected"""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Score every held token of one layer: float32 `[H, L]`, higher is kept longer."""

    def rank(self, measured: Measured) -> Tensor:
        """Score tokens of any number of requests, layers and heads at once, for methods with `Need.OUTPUT_ERROR`;
        float32 `[..., N]`."""
        raise NotImplementedError

    def num_recent(self, num_keep: int, num_protected: int) -> int:
        """How many of `num_keep` tokens count as recent, where the first ones are protected; for methods with
        `Need.OUTPUT_ERROR`."""
        return 0

    @property
    def decay(self) -> float:
        """By what the sums of `Need.OUTPUT_ERROR` are multiplied every 128 tokens, by compactions."""
        return 1.0

    def weights(self, view: View) -> Tensor | None:
        """How much attention every held token of one layer gets by this method's account: float32 `[H, L]`, not
        negative, rows summing to 1; None where the method does not go by attention. Value-aware methods build on it."""
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass with a score of its own must not inherit the operator that computes its parent's.
        if "score" in vars(cls) and "token_score" not in vars(cls):
            cls.token_score = None  # type: ignore[assignment]

    @property
    def token_score(self) -> TokenScore | None:
        """Parameters with which `torch.ops.skipkv.score_tokens` computes what `score` defines, for all layers and
        requests at once; None where it does not."""
        return None

    @property
    def num_sinks(self) -> int:
        """Number of first tokens of the sequence that this method always keeps."""
        return 0

    @property
    def gates_file(self) -> str:
        """Path of the learned gates that `Need.GATES` asks for; see `skipkv_vllm.policies.gates`."""
        return ""

    def check_complete(self) -> None:
        """Raise `KVPolicyError` if a parameter is missing that has no useful default; what serves a policy asks."""
        return

    @property
    def lookahead_plan(self) -> LookaheadPlan | None:
        """What is computed ahead, for policies that need it and are about the prompt."""
        return None

    def num_question(self, window: int) -> int:
        """Number of last tokens of the prompt that this method always keeps and by which it scores the others: the
        question; at most the window."""
        return 0

    def with_question(self, num_question: int) -> Policy:
        """This method with another length of the question.

        Raises:
            KVPolicyError: the method knows no question.
        """
        raise KVPolicyError(
            f"kv_task_tokens={num_question} is given but policy {self.name!r} does not score by a question; "
            "leave it out"
        )

    @property
    def sentence_options(self) -> SentenceOptions:
        """How sentences are found and compared, for policies that need them."""
        return SentenceOptions()

    @property
    def segment_options(self) -> SegmentOptions:
        """What a segment is and how its sparsity is measured, for policies that need segments."""
        return SegmentOptions()

    def remember(self, segments: Segments) -> Tensor:
        """What to keep of each segment until the next compaction, int64 `[S]`; asked once a compaction, before any
        layer is scored."""
        return segments.memory


@dataclass(frozen=True)
class SentenceOptions:
    """How sentences are found and compared.

    Attributes:
        similarity_threshold: cosine above which the earlier of two sentences counts as repeated.
        max_sentences: sentence embeddings kept per request; an older sentence keeps its penalty but can
            no longer be found repeated.
        compat: "default", or "reference" for the token tables of the method's published code.
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


_REGISTRY: dict[str, type[Policy]] = {}
_REFUSED: dict[str, Refusal] = {}
P = TypeVar("P", bound=type[Policy])


def register_policy(cls: P) -> P:
    """Class decorator that makes a policy selectable by its `name`."""
    if cls.name in _REGISTRY:
        raise ValueError(f"a policy named {cls.name!r} is already registered")
    _REGISTRY[cls.name] = cls
    return cls


def policy_names() -> list[str]:
    """Names of all registered policies; "full" (eviction off) comes first."""
    return ["full", *sorted(n for n in _REGISTRY if n != "full")]


def refuse_policy(refusal: Refusal) -> None:
    """Make `check_policy_name` say why a method is not offered."""
    _REFUSED[refusal.name] = refusal


def refusals() -> list[Refusal]:
    """All methods that are known and not offered."""
    return [_REFUSED[name] for name in sorted(_REFUSED)]


def check_policy_name(field: str, name: str) -> None:
    """Raise `KVPolicyError`, with the reason where one is known, unless a policy of this name is registered."""
    if name in _REFUSED:
        refusal = _REFUSED[name]
        raise KVPolicyError(
            f"{field}={name!r} ({refusal.about.paper}, arXiv {refusal.about.arxiv}) is not offered: {refusal.reason}. "
            f"Use {refusal.instead}"
        )
    if name not in _REGISTRY:
        raise KVPolicyError(f"{field}={name!r} is unknown; choose one of: {', '.join(policy_names())}")


def make_policy(name: str, options: dict[str, object] | None = None) -> Policy:
    """Build a policy from its name and the fields to override.

    Raises:
        KVPolicyError: unknown or refused name, unknown field, wrong type or a value out of range.
    """
    check_policy_name("kv_policy", name)
    cls = _REGISTRY[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in (options or {}).items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise KVPolicyError(
                f"kv_policy_config: {key!r} is not a parameter of policy {name!r}; its parameters: {known}"
            )
        default = fields[key].default
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise KVPolicyError(
                f"kv_policy_config: {key}={value!r} must be of type {type(default).__name__} (default {default!r})"
            )
    return cls(**(options or {}))  # type: ignore[arg-type]


def policies_with_weights() -> list[str]:
    """Names of the methods that go by attention and can tell how much; see `Policy.weights`."""
    return sorted(name for name, cls in _REGISTRY.items() if cls.weights is not Policy.weights)


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `KVPolicyError` unless the value is one of those allowed."""
    if value not in allowed:
        raise KVPolicyError(f"kv_policy_config: {field}={value!r} is unknown; choose one of: {', '.join(allowed)}")


def check_odd(field: str, value: int) -> None:
    """Raise `KVPolicyError` for an even value."""
    if value % 2 == 0:
        raise KVPolicyError(f"kv_policy_config: {field}={value} must be odd, e.g. {value + 1}")


def check_range(field: str, value: float, low: float, high: float) -> None:
    """Raise `KVPolicyError` unless low <= value <= high."""
    if not low <= value <= high:
        raise KVPolicyError(f"kv_policy_config: {field}={value!r} is out of range; allowed: {low} to {high}")
