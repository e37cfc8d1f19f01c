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
from .held import Held, HeldRequest
from .options import About, LookaheadPlan, Refusal, SegmentOptions, SentenceOptions
from .view import Measured, Segments, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "About",
    "Held",
    "HeldRequest",
    "LookaheadPlan",
    "Measured",
    "Need",
    "Policy",
    "Refusal",
    "SegmentOptions",
    "Segments",
    "SentenceOptions",
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

    def score_batch(self, held: Held) -> Tensor:
        """Score the tokens of several requests in all layers at once: float32 `[R, layers, H, N]` by slot.

        The scores are those of `score`, which defines the method, but come from a few operators. A method may leave
        this out; the worker then calls `score` for one layer of one request after the other, which takes longer.
        """
        raise NotImplementedError

    @property
    def is_batched(self) -> bool:
        """Whether the method has `score_batch`."""
        return type(self).score_batch is not Policy.score_batch

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

    def weights_batch(self, held: Held) -> Tensor:
        """Return the weights of several requests in all layers at once: float32 `[R, layers, H, N]` by slot.

        A method with `weights` may leave this out; then value-aware methods that build on it are not batched.
        """
        raise NotImplementedError

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A subclass with a definition of its own must not inherit the batched form of its parent's.
        own = vars(cls)
        if ("score" in own or "weights" in own) and "score_batch" not in own:
            cls.score_batch = Policy.score_batch  # type: ignore[method-assign]
        if "weights" in own and "weights_batch" not in own:
            cls.weights_batch = Policy.weights_batch  # type: ignore[method-assign]

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
        """Return a number for each segment to remember until the next compaction, int64 `[R, S]`.

        It is called once for all requests that are compacted together, before any layer is scored.
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
