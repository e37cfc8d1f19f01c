"""Options of a request, and detection of misspelt option names."""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import KVPolicyError
from ..core.limits import NO_DRAFTS, NO_OTHERS, Demand, DraftSlots, Limits, OtherGroups, RecallLimits, most_tokens
from ..core.needs import IN_THE_CACHE, Need
from ..core.orders import Strength
from ..policies import Policy, make_policy
from .checks import MAX_ALPHA, check_budget, check_prompt, check_question, check_recall, describe, need_names
from .server import CONFIG_KEY, OFF, KVPolicyConfig, flag_names

MAX_NAMES, MAX_NAME_LENGTH = 1024, 64
"""Only so many names, of such lengths, are checked: a client may send any number of names of any length."""

SIMILAR_NAMES = 0.85
"""`difflib` ratio from which a name counts as a misspelling of another one"""


@dataclass(frozen=True)
class ResolvedRequest:
    """The settings that apply to one request: its own options, and the server's where it sets none.

    Attributes:
        policy: its method.
        needs: inputs that the workers collect for it.
        limits: how many tokens it may hold; None if it keeps everything.
        num_prompt: prompt length.
        num_question: length of the question at the prompt's end, if the request sets it; else 0.
        vector: name of its steering vector; None if it is not steered.
        strength: how strongly it is steered.
    """

    policy: Policy
    needs: Need
    limits: Limits | None
    num_prompt: int
    num_question: int
    vector: str | None
    strength: Strength

    def demand(
        self, longest: int, block_size: int, others: OtherGroups = NO_OTHERS, drafts: DraftSlots = NO_DRAFTS
    ) -> Demand:
        """Return the most that the request may need.

        Args:
            longest: most tokens that it ever has.
            block_size: tokens of a block of the group that is compacted.
            others: the groups that are not.
            drafts: slots for drafts.
        """
        limits, num_beside = self.limits, others.num_blocks(longest)
        if limits is None:
            peaks = others.peaks(longest, longest)
            num_tokens = drafts.beyond(longest)
            return Demand(num_tokens, sys.maxsize, num_beside=num_beside, peaks=peaks, at_rest=others.at_rest)
        # A prompt is computed up to its bound and, once it is compacted, by as much as the buffer more in each step.
        peaks = others.peaks(longest, limits.first_bound + (others.num_steps - 1) * limits.buffer)
        num_intact = limits.protected // block_size
        num_tokens = drafts.beyond(most_tokens(limits, longest))
        return Demand(num_tokens, num_intact, limits.lookahead, num_beside, peaks, others.at_rest)


class RequestOptions(BaseModel):
    """Options of a request, given in `vllm_xargs` or `SamplingParams.extra_args`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kv_policy: str | None = Field(
        None, description='Method for this request; "full" keeps everything. Default: the server\'s.'
    )
    kv_budget: int | None = Field(None, description="Budget of this request. Default: the server's.")
    kv_task_tokens: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Tokens of the question at the prompt's end, for methods that score by it. Default: the method's.",
    )
    steering: str | None = Field(
        None, description='Name of a registered steering vector, or "off". Default: the server\'s.'
    )
    steering_alpha0: float | None = Field(
        None, ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False, description="Initial strength. Default: the server's."
    )
    steering_gamma: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="Strength per thought. Default: the server's."
    )

    @classmethod
    def parse(
        cls,
        extra_args: dict[str, Any] | None,
        config: KVPolicyConfig,
        max_model_len: int,
        *,
        check_names: bool = True,
    ) -> RequestOptions:
        """Read and check the options of a request, ignoring keys that are not ours.

        Args:
            extra_args: the request's `vllm_xargs` or `extra_args`.
            config: configuration of the server.
            max_model_len: longest request of the model.
            check_names: refuse misspelt names of options; False if they were checked before.

        Raises:
            KVPolicyError: a bad option; the message names the field, the value and what is allowed.
        """
        given = extra_args or {}
        if check_names:
            cls.check_names(given)
        ours = {key: value for key, value in given.items() if key in cls.model_fields}
        try:
            options = cls(**ours)
        except ValidationError as error:
            raise KVPolicyError(describe(error)) from None
        policy = options.resolve_policy(config)
        options._check_steering(config)
        if policy.name != "full" and not config.evicts:
            raise KVPolicyError(
                f"kv_policy={options.kv_policy!r} is not available, because this server evicts nothing; start "
                "the server with --kv-policy, or choose 'full'"
            )
        if policy.name == "full" and options.kv_budget is not None:
            cause = "kv_policy='full' keeps all tokens" if config.evicts else "this server evicts nothing"
            raise KVPolicyError(f"kv_budget={options.kv_budget} has no effect, because {cause}; leave it out")
        policy.check_complete()
        check_prompt(policy, config.kv_protect_prompt)
        check_question("kv_task_tokens", policy, config.kv_window)
        if config.recalls:
            check_recall("kv_policy", policy)
        missing = config.needs_of(policy) & ~(config.needs | IN_THE_CACHE)
        if missing:
            raise KVPolicyError(
                f"kv_policy={options.kv_policy!r} needs {need_names(missing)}, which this server does not collect; "
                f"start the server with --kv-request-policies {options.kv_policy}, or choose {config.kv_policy!r} "
                "or 'full'"
            )
        if options.kv_budget is not None:
            check_budget("kv_budget", options.kv_budget, policy, config.kv_window, max_model_len)
        else:
            # The server's budget was checked for its own method, which may have fewer sinks.
            check_budget("kv_budget", config.kv_budget, policy, config.kv_window)
        return options

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse misspelt names of options, which would otherwise be ignored silently.

        Raises:
            KVPolicyError: a misspelt name; the message has the correct one, or the flag of an option of the server.
        """
        for name in itertools.islice(map(str, names), MAX_NAMES):
            is_foreign = len(name) > MAX_NAME_LENGTH or name in cls.model_fields
            meant = None if is_foreign else meant_option(name)
            if meant is None:
                continue
            if meant in cls.model_fields:
                raise KVPolicyError(f"{name!r} is not a request option; did you mean {meant!r}?")
            if meant == CONFIG_KEY:
                problem = "is not a request option; write each option under its own name"
            else:
                problem = f"can only be set for the whole server; start the server with {flag_names()[meant]}"
            raise KVPolicyError(f"{name!r} {problem}. A request may set: {', '.join(cls.model_fields)}")

    def _check_steering(self, config: KVPolicyConfig) -> None:
        if self.steering is not None and not config.steers:
            if self.steering != OFF:
                raise KVPolicyError(
                    f"steering={self.steering!r}: this server has no steering vectors; start the server with "
                    "--kv-steering-vectors"
                )
        elif self.steering not in (None, OFF, *config.kv_steering_vectors):
            raise KVPolicyError(
                f"steering={self.steering!r} is not registered; choose one of: "
                f"{', '.join((OFF, *config.kv_steering_vectors))}"
            )
        if self.vector(config) is None:
            for field in ("steering_alpha0", "steering_gamma"):
                if getattr(self, field) is not None:
                    vectors = ", ".join(config.kv_steering_vectors)
                    remedy = f"name a vector with 'steering': {vectors}" if vectors else "leave it out"
                    raise KVPolicyError(
                        f"{field}={getattr(self, field)} is given but this request is not steered; {remedy}"
                    )

    def check_streaming(self) -> None:
        """Refuse options that a streaming-input session cannot have, as its prompt grows: eviction and steering.

        Raises:
            KVPolicyError: such options are given.
        """
        harmless = {"kv_policy": "full", "steering": OFF}
        given = self.model_dump(exclude_none=True)
        if refused := [f"{name}={value!r}" for name, value in given.items() if value != harmless.get(name)]:
            raise KVPolicyError(
                f"{', '.join(refused)} cannot be set in a streaming-input session, where nothing is evicted or "
                "steered; leave this out, or send the input as separate requests"
            )

    def resolve(self, config: KVPolicyConfig, num_prompt: int) -> ResolvedRequest:
        """Settle what applies to this request.

        Args:
            config: of the server.
            num_prompt: prompt length.
        """
        policy = self.resolve_policy(config)
        return ResolvedRequest(
            policy=policy,
            needs=config.needs_of(policy),
            limits=self._limits(policy, config, num_prompt),
            num_prompt=num_prompt,
            num_question=self.kv_task_tokens or 0,
            vector=self.vector(config),
            strength=self.strength(config),
        )

    def _limits(self, policy: Policy, config: KVPolicyConfig, num_prompt: int) -> Limits | None:
        if policy.name == "full":
            return None
        plan, window = policy.lookahead_plan, config.kv_window
        prompt_end = num_prompt if policy.compacts_prompt else 0
        return Limits(
            budget=config.kv_budget if self.kv_budget is None else self.kv_budget,
            buffer=config.kv_buffer,
            window=window,
            protected=num_prompt if config.kv_protect_prompt else 0,
            deferred=(prompt_end or num_prompt + window) if config.kv_defer_prompt else 0,
            prompt_end=prompt_end,
            num_draft=0 if plan is None else plan.num_tokens,
            num_question=policy.num_question(window) if plan is not None and plan.draft is None else 0,
            recall=RecallLimits(config.kv_recall_share, config.kv_recall_interval, num_prompt, policy.num_sinks)
            if config.recalls
            else None,
        )

    def vector(self, config: KVPolicyConfig) -> str | None:
        """Return the name of the vector that steers this request, if any."""
        name = config.kv_steering_default if self.steering is None else self.steering
        return None if name == OFF else name

    def strength(self, config: KVPolicyConfig) -> Strength:
        """Return the steering strength of this request."""
        return Strength(
            config.kv_steering_alpha0 if self.steering_alpha0 is None else self.steering_alpha0,
            config.kv_steering_gamma if self.steering_gamma is None else self.steering_gamma,
            float("inf") if config.kv_steering_alpha_max is None else config.kv_steering_alpha_max,
        )

    def resolve_policy(self, config: KVPolicyConfig) -> Policy:
        """Return the method of this request: the server's own, or another one with its default parameters."""
        own = self.kv_policy is None or self.kv_policy == config.kv_policy
        policy = config.policy if own else make_policy(str(self.kv_policy))
        return policy if self.kv_task_tokens is None else policy.with_question(self.kv_task_tokens)


KEEP_EVERYTHING = RequestOptions.model_validate({"kv_policy": "full", "steering": OFF})
"""Options of a request that is neither compacted nor steered, e.g. of a streaming-input session."""


@functools.lru_cache(maxsize=4096)
def meant_option(name: str) -> str | None:
    """Return the option of a request, or else of the server, that a name resembles; None for unrelated names.

    Case, separators and the prefixes `kv` and `skipkv` are ignored, and so is a misspelling in a name with such a
    prefix. A name with our own prefix that resembles no option gives `CONFIG_KEY`.
    """
    if name in KVPolicyConfig.model_fields:
        return name
    letters, core = _letters(name), _core(name)
    cores, spelt = _options_by(_core), _options_by(_letters)
    if core in cores:
        return cores[core]
    wanted = letters if letters == core else f"kv{core}"
    # A cheap upper bound of the ratio, which counts matching letters.
    near = [
        option
        for option in spelt
        if 2 * min(len(wanted) - len(set(wanted) - set(option)), len(option))
        >= SIMILAR_NAMES * (len(wanted) + len(option))
    ]
    if close := difflib.get_close_matches(wanted, near, n=1, cutoff=SIMILAR_NAMES):
        return spelt[close[0]]
    return CONFIG_KEY if letters.startswith(CONFIG_KEY) else None


def has_our_prefix(name: str) -> bool:
    """Return whether a name begins with `kv` or `skipkv`, in any spelling."""
    return _letters(name) != _core(name)


@functools.cache
def _options_by(form: Callable[[str], str]) -> dict[str, str]:
    # Options of a request come last, so that they win over options of the server with the same form.
    return {form(name): name for name in (*KVPolicyConfig.model_fields, *RequestOptions.model_fields)}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _core(name: str) -> str:
    return re.sub(r"^(?:(?:skip)?kv)+", "", _letters(name))
