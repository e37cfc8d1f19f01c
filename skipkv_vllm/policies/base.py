"""The base class of policies, frozen dataclasses that score every held token, and their registry."""

from __future__ import annotations

import dataclasses
import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ..core.errors import KVPolicyError
from ..core.needs import Need
from .checks import check_choice, check_odd, check_range
from .options import About, LookaheadPlan, Refusal, SegmentOptions, SentenceOptions, TokenScore
from .view import Measured, Segments, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "About",
    "LookaheadPlan",
    "Measured",
    "Need",
    "Policy",
    "Refusal",
    "SegmentOptions",
    "Segments",
    "SentenceOptions",
    "TokenScore",
    "View",
    "check_choice",
    "check_odd",
    "check_policy_name",
    "check_range",
    "make_policy",
    "policies_with_weights",
    "policy_names",
    "refusals",
    "refuse_policy",
    "register_policy",
]


@dataclass(frozen=True)
class Policy(ABC):
    """An eviction method. Subclasses are frozen dataclasses whose fields are its hyper-parameters."""

    name: ClassVar[str]
    about: ClassVar[About] = About()
    needs: ClassVar[Need] = Need.NOTHING
    compacts_prompt: ClassVar[bool] = False
    """whether a prompt longer than the budget is compacted as soon as it is computed, not only at the bound; such a
    method requires a prompt that is not protected"""

    @abstractmethod
    def score(self, view: View) -> Tensor:
        """Score every held token of one layer: float32 `[H, L]`; higher scores are kept longer."""

    def rank(self, measured: Measured) -> Tensor:
        """Score tokens of any number of requests, layers and heads at once: float32 `[..., N]`.

        Only methods with `Need.OUTPUT_ERROR` implement it.
        """
        raise NotImplementedError

    def num_recent(self, num_keep: int, num_protected: int) -> int:
        """Return how many of `num_keep` tokens count as recent if the first `num_protected` are protected.

        Only methods with `Need.OUTPUT_ERROR` use it.
        """
        return 0

    @property
    def decay(self) -> float:
        """Factor per 128 tokens by which compactions discount the sums of `Need.OUTPUT_ERROR`."""
        return 1.0

    def weights(self, view: View) -> Tensor | None:
        """Return the attention weight of every held token of one layer, on which value-aware methods build.

        The weights are float32 `[H, L]`, not negative, and sum to 1 along L. None for methods that do not score by
        attention.
        """
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass with its own score must not inherit the operator that computes its parent's.
        if "score" in vars(cls) and "token_score" not in vars(cls):
            cls.token_score = None  # type: ignore[assignment]

    @property
    def token_score(self) -> TokenScore | None:
        """Parameters with which the operator `score_tokens` computes `score`; None if it cannot.

        The operator scores all layers and requests at once.
        """
        return None

    @property
    def num_sinks(self) -> int:
        """Number of first tokens of the sequence that the method always keeps."""
        return 0

    @property
    def gates_file(self) -> str:
        """Path of the learned gates, for methods with `Need.GATES`; see `skipkv_vllm.policies.gates`."""
        return ""

    def check_complete(self) -> None:
        """Raise `KVPolicyError` if a parameter without a useful default is missing; servers call it."""
        return

    @property
    def lookahead_plan(self) -> LookaheadPlan | None:
        """Tokens to compute ahead, for methods with `Need.LOOKAHEAD`."""
        return None

    def num_question(self, window: int) -> int:
        """Return the length of the question, at most the window; its tokens always stay and score the others."""
        return 0

    def with_question(self, num_question: int) -> Policy:
        """Return this method with another length of the question.

        Raises:
            KVPolicyError: the method does not score by a question.
        """
        raise KVPolicyError(
            f"kv_task_tokens={num_question} is given but policy {self.name!r} does not score by a question; "
            "leave it out"
        )

    @property
    def sentence_options(self) -> SentenceOptions:
        """How sentences are found and compared, for methods with `Need.SENTENCES`."""
        return SentenceOptions()

    @property
    def segment_options(self) -> SegmentOptions:
        """The length of a segment and how its sparsity is measured, for methods with `Need.SEGMENTS`."""
        return SegmentOptions()

    def remember(self, segments: Segments) -> Tensor:
        """Return a number for each segment to remember until the next compaction, int64 `[S]`.

        It is called once per compaction, before any layer is scored.
        """
        return segments.memory


_REGISTRY: dict[str, type[Policy]] = {}
_REFUSED: dict[str, Refusal] = {}
P = TypeVar("P", bound=type[Policy])


def register_policy(cls: P) -> P:
    """Make a policy selectable by its `name`; a class decorator."""
    if cls.name in _REGISTRY:
        raise ValueError(f"a policy named {cls.name!r} is already registered")
    _REGISTRY[cls.name] = cls
    return cls


def policy_names() -> list[str]:
    """Return the names of all registered policies; "full" (eviction off) comes first."""
    return ["full", *sorted(n for n in _REGISTRY if n != "full")]


def refuse_policy(refusal: Refusal) -> None:
    """Register the reason for which a method is not offered; `check_policy_name` reports it."""
    _REFUSED[refusal.name] = refusal


def refusals() -> list[Refusal]:
    """Return all methods that are known but not offered."""
    return [_REFUSED[name] for name in sorted(_REFUSED)]


def check_policy_name(field: str, name: str) -> None:
    """Raise `KVPolicyError` unless a policy of this name is registered; with the reason if one is known."""
    if name in _REFUSED:
        refusal = _REFUSED[name]
        raise KVPolicyError(
            f"{field}={name!r} ({refusal.about.paper}, arXiv {refusal.about.arxiv}) is not offered: {refusal.reason}. "
            f"Use {refusal.instead}"
        )
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name.lower(), policy_names(), 1)
        hint = f"did you mean {close[0]!r}? Choose one of" if close else "choose one of"
        raise KVPolicyError(f"{field}={name!r} is unknown; {hint}: {', '.join(policy_names())}")


def make_policy(name: str, options: dict[str, object] | None = None) -> Policy:
    """Build a policy from its name and the parameters to override.

    Raises:
        KVPolicyError: unknown or refused name, unknown parameter, wrong type, or a value out of range.
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
    """Return the names of the methods that score by attention; see `Policy.weights`."""
    return sorted(name for name, cls in _REGISTRY.items() if cls.weights is not Policy.weights)
