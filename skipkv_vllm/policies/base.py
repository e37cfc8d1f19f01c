"""What a policy is: a frozen dataclass of hyper-parameters with a score for every held token."""

from __future__ import annotations

import dataclasses
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
