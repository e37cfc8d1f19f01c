"""The configuration of a server: each field is a flag of `vllm serve` and an argument of `LLM`."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..core.errors import KVPolicyError
from ..core.needs import ACCUMULATED, NUM_ACCUMULATED, NUM_ASKING, REPEATS, Need
from ..policies import Policy, check_policy_name, make_policy, policy_names
from ..policies.gates import Gates
from ..steering import SteeringVector
from .checks import MAX_ALPHA, check_budget, check_prompt, check_question, check_recall, describe, needs_of

CONFIG_KEY = "skipkv"
"""Key of the configuration in vLLM's `additional_config`."""

OFF = "off"
"""Value of `kv_steering_default` and of a request's `steering` for no steering."""

MOST_COMPACTIONS = 16
_VECTOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class KVPolicyConfig(BaseModel):
    """KV-cache policy of a server."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    kv_policy: str = Field(
        "full",
        description="Eviction method: " + ", ".join(policy_names()) + '. "full" evicts nothing.',
    )
    kv_budget: int = Field(
        1024,
        ge=2,
        strict=True,
        description="Tokens that a request keeps when it is compacted, prompt included. A protected prompt longer than "
        "the budget is kept whole, and raises the bound of its request.",
    )
    kv_buffer: int = Field(
        128,
        ge=1,
        strict=True,
        description="Tokens by which a request may exceed the budget before it is compacted.",
    )
    kv_window: int = Field(
        8,
        ge=1,
        le=64,
        strict=True,
        description="Number of newest tokens that always survive. Methods that score by recent queries use theirs.",
    )
    kv_granularity: Literal["head", "sentence"] = Field(
        "head",
        description='"head": every layer and kv head keeps its own tokens. '
        '"sentence": whole sentences are evicted, the same ones in all layers and heads.',
    )
    kv_protect_prompt: bool = Field(True, description="Never evict the prompt. Off: evict it like any other text.")
    kv_defer_prompt: bool = Field(
        False,
        description="With --no-kv-protect-prompt: keep a prompt longer than the bound whole until --kv-window "
        "tokens have been generated, then score it by their queries; finch and laq compact it at its end. Off: compact "
        "it between chunks, which bounds memory during prefill too.",
    )
    kv_admission: Literal["bounded", "optimistic"] = Field(
        "bounded",
        description='"bounded": a request starts once all the blocks it may ever hold fit beside those of the running '
        'requests, so none is ever preempted for lack of blocks. "optimistic": it starts once its prompt fits, as in '
        "stock vLLM; more requests run at once while they are short, and some are preempted and computed again when "
        "they grow.",
    )
    kv_compactions_per_step: int = Field(
        MOST_COMPACTIONS,
        ge=1,
        strict=True,
        description="Most requests that are compacted in one step; the others that are due wait for a later one, which "
        "changes no token. It bounds how long a step takes when many requests grow in time with each other. More are "
        "compacted where fewer would let requests fall behind.",
    )
    kv_recall_memory: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Host memory in GiB for evicted tokens, of all requests and GPUs of an engine together. They come "
        "back when the text turns back to them. 0: what is evicted is gone.",
    )
    kv_recall_share: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="Largest share of the budget, without protected prompt and window, for tokens that came back. They "
        "replace those that the method values least.",
    )
    kv_recall_interval: int = Field(
        16,
        ge=1,
        strict=True,
        description="Decoded tokens after which evicted ones may come back, beside compactions and a prompt's end.",
    )
    kv_recall_threshold: float = Field(
        0.8,
        gt=0,
        allow_inf_nan=False,
        description="Evidence from which tokens come back; half as much at the end of a prompt. A head gives ln(w / 4) "
        "if a recent query attends to a token w times as much as to the mean one; the mean of heads without it counts.",
    )
    kv_policy_config: dict[str, Any] = Field(
        default_factory=dict,
        description='Parameters of the method as JSON, e.g. {"recent_share": 0.4, "decay": 0.8}.',
    )
    kv_request_policies: list[str] = Field(
        default_factory=list,
        description="Further methods that a request may choose with its `kv_policy`. Methods whose inputs the server "
        "collects anyway need not be named.",
    )
    kv_batch_grouping: Literal["off", "prefill-length"] = Field(
        "off",
        description='"prefill-length": admit waiting requests of similar prompt length together. It '
        "rarely helps, because vLLM does not pad prompts.",
    )
    kv_grouping_width: int = Field(
        256, ge=1, strict=True, description="Largest difference in prompt length within a group, in tokens."
    )
    kv_grouping_max_wait: float = Field(
        5.0,
        ge=0,
        allow_inf_nan=False,
        description="Longest time in seconds that grouping may hold a request past its first-come-first-served turn; "
        "after that, no later arrival goes first. 0 keeps the order of arrival.",
    )
    kv_prefix_eviction: Literal["lru", "guard"] = Field(
        "lru",
        description='Which block of the prefix cache to replace first. "lru": as in stock vLLM. "guard": LRU, '
        "but blocks evicted too early are protected when they return; it helps when prompts recur in a cycle.",
    )
    kv_trace_dir: str | None = Field(
        None, description="Write a trace, `<request-id>.safetensors`, of each finished request into this folder."
    )
    kv_check_integrity: bool = Field(
        False, description="Verify all bookkeeping after every step. Slow; for tests and bug reports."
    )
    kv_steering_vectors: dict[str, str] = Field(
        default_factory=dict,
        description="Steering vectors that requests may choose, as NAME=PATH (see `skipkv extract-vector`). They "
        "reduce the model's re-checking, which shortens answers; they also work with --kv-policy full.",
    )
    kv_steering_default: str = Field(
        OFF, description='Vector for requests that do not set `steering`; "off" steers only those that do.'
    )
    kv_steering_alpha0: float = Field(
        1.0,
        ge=-MAX_ALPHA,
        le=MAX_ALPHA,
        allow_inf_nan=False,
        description="Initial strength: the factor by which the vector is multiplied when it is added at the end of a "
        "thought.",
    )
    kv_steering_gamma: float = Field(
        0.02,
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="Strength added per non-execution thought (a doubt or a change of approach).",
    )
    kv_steering_alpha_max: float | None = Field(
        None, gt=0, le=MAX_ALPHA, allow_inf_nan=False, description="Upper limit of the strength."
    )
    kv_steering_interval: int = Field(
        128, ge=1, le=2**31 - 1, strict=True, description="Number of positions between updates of the strength."
    )
    kv_steering_compat: Literal["default", "published"] = Field(
        "default",
        description='"published": follow the published code, which also counts the thoughts of the prompt and may '
        "steer its last token.",
    )

    @field_validator("kv_policy")
    @classmethod
    def _known_policy(cls, value: str) -> str:
        make_policy(value)
        return value

    @field_validator("kv_request_policies")
    @classmethod
    def _known_policies(cls, value: list[str]) -> list[str]:
        for name in value:
            if "," in name:
                raise KVPolicyError(f"kv_request_policies={name!r} is not a name; separate names by spaces")
            check_policy_name("kv_request_policies", name)
        return value

    @field_validator("kv_trace_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @field_validator("kv_steering_vectors", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Convert the list of NAME=PATH that the flag gives."""
        if not isinstance(value, list):
            return value
        pairs = [str(pair).partition("=") for pair in value]
        for name, equals, path in pairs:
            if not (equals and path):
                raise KVPolicyError(
                    f"kv_steering_vectors: {name + equals!r} is not NAME=PATH; write e.g. math=/models/math.safetensors"
                )
        names = [name for name, *_ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise KVPolicyError(f"kv_steering_vectors: {', '.join(twice)} is given twice; names must differ")
        return {name: path for name, _, path in pairs}

    @field_validator("kv_steering_vectors")
    @classmethod
    def _named_files(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name == OFF or not _VECTOR_NAME.fullmatch(name):
                raise KVPolicyError(
                    f"kv_steering_vectors: {name!r} is not allowed as a name; use letters, digits, '.', '_' and '-', "
                    f"and not {OFF!r}"
                )
        return {name: str(Path(path).expanduser().absolute()) for name, path in value.items()}

    @model_validator(mode="after")
    def _check_methods(self) -> KVPolicyConfig:
        check_budget("kv_budget", self.kv_budget, self.policy, self.kv_window)
        for policy in self.policies:
            policy.check_complete()
            check_prompt(policy, self.kv_protect_prompt)
        check_question("kv_policy_config: task_tokens", self.policy, self.kv_window)
        if self.policy.name == "full" and self.kv_policy_config:
            raise KVPolicyError("kv_policy_config is given but kv_policy is 'full', which has no parameters; drop it")
        if self.policy.name == "full" and self.kv_request_policies:
            raise KVPolicyError(
                "kv_request_policies is given but kv_policy is 'full', which turns eviction off; start the server "
                'with one of them as --kv-policy and let requests choose "full"'
            )
        if REPEATS in self.needs:
            raise KVPolicyError(
                "kv_policy and kv_request_policies compare sentences in two ways, by hidden states and by words, but a "
                "server can do only one; drop one of the methods"
            )
        return self

    @model_validator(mode="after")
    def _check_steering(self) -> KVPolicyConfig:
        if not self.kv_steering_vectors and (flags := self._changed("kv_steering_", "kv_steering_vectors")):
            raise KVPolicyError(
                f"{flags} given without --kv-steering-vectors, so nothing would be steered; register a vector"
            )
        if self.kv_steering_default not in (OFF, *self.kv_steering_vectors):
            raise KVPolicyError(
                f"kv_steering_default={self.kv_steering_default!r} is not registered; choose one of: "
                f"{', '.join((OFF, *self.kv_steering_vectors))}"
            )
        return self

    @model_validator(mode="after")
    def _check_recall(self) -> KVPolicyConfig:
        if not self.recalls and (flags := self._changed("kv_recall_", "kv_recall_memory")):
            raise KVPolicyError(f"{flags} given without --kv-recall-memory, so nothing would come back; add that flag")
        if self.recalls and not self.evicts:
            raise KVPolicyError(
                "kv_recall_memory is given but kv_policy is 'full', which evicts nothing; drop one of them"
            )
        for policy in self.policies if self.recalls else ():
            check_recall("kv_policy", policy)
        return self

    def _changed(self, prefix: str, main: str = "") -> str:
        """Return the flags of a group, beside its main one, that were set to another value than the default."""
        names = {name for name in self.model_fields_set - {main} if name.startswith(prefix)}
        changed = {n for n in names if getattr(self, n) != KVPolicyConfig.model_fields[n].get_default()}
        return ", ".join(flag_names()[name] for name in sorted(changed))

    @model_validator(mode="after")
    def _check_prompt(self) -> KVPolicyConfig:
        if self.kv_defer_prompt and self.kv_protect_prompt:
            raise KVPolicyError(
                "kv_defer_prompt is given but the prompt is protected, so it has no effect; add "
                "--no-kv-protect-prompt or drop --kv-defer-prompt"
            )
        return self

    @model_validator(mode="after")
    def _check_scheduling(self) -> KVPolicyConfig:
        if self.kv_batch_grouping == "off" and (flags := self._changed("kv_grouping_")):
            raise KVPolicyError(
                f"{flags} given although kv_batch_grouping is 'off', so nothing is grouped; add --kv-batch-grouping "
                "prefill-length"
            )
        for name, stock in {"kv_batch_grouping": "off", "kv_prefix_eviction": "lru"}.items():
            if getattr(self, name) != stock and not self.is_active:
                raise KVPolicyError(
                    f"{name} is given but kv_policy is 'full' and nothing is steered, so vLLM's own "
                    f"scheduler runs; choose another --kv-policy or drop {flag_names()[name]}"
                )
        return self

    @functools.cached_property
    def policy(self) -> Policy:
        """The configured method."""
        return make_policy(self.kv_policy, self.kv_policy_config)

    @property
    def policies(self) -> list[Policy]:
        """The configured method and the further ones; the configured one keeps its parameters if it is named again."""
        further = [name for name in self.kv_request_policies if name != self.kv_policy]
        return [self.policy, *map(make_policy, further)]

    @property
    def evicts(self) -> bool:
        """Whether anything can be evicted on this server."""
        return self.kv_policy != "full"

    @property
    def recalls(self) -> bool:
        """Whether evicted tokens may come back on this server."""
        return self.kv_recall_memory > 0

    @property
    def steers(self) -> bool:
        """Whether a request can be steered on this server."""
        return bool(self.kv_steering_vectors)

    @property
    def is_active(self) -> bool:
        """Whether this server differs from stock vLLM."""
        return self.evicts or self.steers

    def load_vectors(self) -> list[SteeringVector]:
        """Load the registered vectors in order; the n-th one, from 1, is row n of the table of vectors.

        Raises:
            KVPolicyError: a file is missing or not a vector.
        """
        vectors = []
        for name, path in self.kv_steering_vectors.items():
            try:
                vectors.append(SteeringVector.load(path))
            except KVPolicyError as error:
                raise KVPolicyError(f"kv_steering_vectors: {name}: {error}") from None
        return vectors

    @functools.cached_property
    def gates(self) -> Gates | None:
        """The learned gates of the policy; None if it needs none.

        Raises:
            KVPolicyError: the file is missing or holds no gates.
        """
        return Gates.load(self.policy.gates_file) if self.needs & Need.GATES else None

    @functools.cached_property
    def needs(self) -> Need:
        """What the workers of this server collect."""
        needs = Need.NOTHING
        for policy in self.policies:
            needs |= self.needs_of(policy)
        return needs

    def needs_of(self, policy: Policy) -> Need:
        """Return what the workers of this server collect for a policy."""
        return needs_of(policy, self.kv_granularity, recalls=self.recalls)

    @property
    def num_queries(self) -> int:
        """Number of newest queries that the workers keep per request."""
        accumulated, asking = NUM_ACCUMULATED * bool(self.needs & ACCUMULATED), NUM_ASKING * self.recalls
        return max(self.kv_window, accumulated, asking)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> KVPolicyConfig:
        """Build the configuration from the values of flags.

        Raises:
            KVPolicyError: bad values; the message names each field.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise KVPolicyError(describe(error)) from None


@functools.cache
def flag_names() -> dict[str, str]:
    """Return field name -> flag for all fields of `KVPolicyConfig`."""
    return {name: "--" + name.replace("_", "-") for name in KVPolicyConfig.model_fields}


def shown_default(name: str) -> str:
    """Return a field's default as help texts and docs show it."""
    default = str(KVPolicyConfig.model_fields[name].get_default(call_default_factory=True))
    return {"None": "off", "True": "on", "False": "off", "[]": "none", "{}": "none"}.get(default, default)
