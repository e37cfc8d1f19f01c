"""Configuration: one pydantic model for the server and one for a request.

They are the only source of the command-line flags, their help, their validation and the table in the
README (`python -m skipkv_vllm.config` prints it).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import KVPolicyError
from .gates import Gates
from .policies import (
    ACCUMULATED,
    IN_THE_CACHE,
    NUM_ACCUMULATED,
    REPEATS,
    Need,
    Policy,
    check_policy_name,
    make_policy,
    policy_names,
)
from .steering import SteeringVector
from .steering.controller import Strength

CONFIG_KEY = "skipkv"
"""Key of the configuration in vLLM's `additional_config`."""

OFF = "off"
"""What `kv_steering_default` and a request's `steering` say for no steering."""

MAX_ALPHA = 10.0
MAX_NAMES, MAX_NAME_LENGTH = 1024, 64
SIMILAR_NAMES = 0.85
"""`difflib` ratio from which a name is taken for another one with a typing error"""
GROUPING_WIDTH, GROUPING_MAX_WAIT = 256, 5.0
_VECTOR_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

OPTIONAL_NEEDS = {"sentence": Need.SENTENCES, "head": Need.NOTHING}


class KVPolicyConfig(BaseModel):
    """KV-cache policy of a server."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    kv_policy: str = Field(
        "full",
        description="Eviction method that keeps the KV cache of every running request within the budget: "
        + ", ".join(policy_names())
        + '. "full" evicts nothing.',
    )
    kv_budget: int = Field(
        1024,
        ge=2,
        strict=True,
        description="Tokens of KV a request is compacted to, prompt included. A prompt longer than the "
        "budget raises the bound of its own request.",
    )
    kv_buffer: int = Field(
        128,
        ge=1,
        strict=True,
        description="Tokens a request may grow beyond the budget before it is compacted: it never holds "
        "more than budget + buffer.",
    )
    kv_window: int = Field(
        8,
        ge=1,
        le=64,
        strict=True,
        description="Newest tokens that always survive; their queries score the older ones.",
    )
    kv_granularity: Literal["head", "sentence"] = Field(
        "head",
        description='"head": every layer and kv head keeps its own tokens (the paper\'s method). '
        '"sentence": whole sentences leave, the same for all layers and heads.',
    )
    kv_protect_prompt: bool = Field(
        True, description="Never evict the prompt. Off reproduces the paper, which evicts it like any other text."
    )
    kv_defer_prompt: bool = Field(
        False,
        description="With --no-kv-protect-prompt: hold a prompt longer than the bound whole until --kv-window more "
        "tokens are written, and let their queries choose what stays of it; methods about the prompt choose as soon as "
        "it is computed. Off: it is compacted between chunks, which bounds memory during prefill too.",
    )
    kv_admission: Literal["bounded", "optimistic"] = Field(
        "bounded",
        description='"bounded": a request starts once all the pages it may ever hold fit beside those of the running '
        'ones, so none is ever preempted. "optimistic": it starts once its prompt fits, as in stock vLLM; more run at '
        "once while they are short, and some are preempted and computed again when they grow.",
    )
    kv_policy_config: dict[str, Any] = Field(
        default_factory=dict,
        description='Parameters of the method as JSON, e.g. {"recent_share": 0.4, "decay": 0.8}.',
    )
    kv_request_policies: list[str] = Field(
        default_factory=list,
        description="Further methods that a request may choose with its `kv_policy`, on top of those whose inputs "
        "the server's own method collects anyway.",
    )
    kv_batch_grouping: Literal["off", "prefill-length"] = Field(
        "off",
        description='"prefill-length": waiting requests of similar prompt length are admitted together. '
        "docs/scheduling.md says when that helps.",
    )
    kv_grouping_width: int = Field(
        GROUPING_WIDTH, ge=1, strict=True, description="Tokens by which the prompts of a group may differ."
    )
    kv_grouping_max_wait: float = Field(
        GROUPING_MAX_WAIT,
        ge=0,
        allow_inf_nan=False,
        description="Seconds past its turn, in order of arrival, from which no later request is admitted before a "
        "waiting one. 0 is order of arrival.",
    )
    kv_prefix_eviction: Literal["lru", "guard"] = Field(
        "lru",
        description='Which page of the prefix cache gives way to a new one: "lru", as in stock vLLM, or "guard", which '
        "follows LRU where it is right and does not fail where prompts come round in turn.",
    )
    kv_trace_dir: str | None = Field(
        None, description="Write one replayable <request-id>.safetensors per finished request into this folder."
    )
    kv_check_integrity: bool = Field(
        False, description="Verify all bookkeeping after every step. Slow; for tests and bug reports."
    )
    kv_steering_vectors: dict[str, str] = Field(
        default_factory=dict,
        description="Steering vectors that requests may name, as NAME=PATH (see `skipkv extract-vector`). They "
        "make the model doubt less and go on; also with --kv-policy full.",
    )
    kv_steering_default: str = Field(
        OFF, description='Vector of requests that name none with their `steering`; "off" steers only those that do.'
    )
    kv_steering_alpha0: float = Field(
        1.0,
        ge=-MAX_ALPHA,
        le=MAX_ALPHA,
        allow_inf_nan=False,
        description="Strength at first: the vector is added this many times at the end of each thought.",
    )
    kv_steering_gamma: float = Field(
        0.02,
        ge=-1,
        le=1,
        allow_inf_nan=False,
        description="What each thought that is no execution (a doubt, a change of approach) adds to the strength.",
    )
    kv_steering_alpha_max: float | None = Field(
        None, gt=0, le=MAX_ALPHA, allow_inf_nan=False, description="The most that the strength grows to."
    )
    kv_steering_interval: int = Field(
        128, ge=1, le=2**31 - 1, strict=True, description="Positions after which the strength is brought up to date."
    )
    kv_steering_compat: Literal["default", "reference"] = Field(
        "default",
        description='"reference": the rules of the published code, which counts the thoughts of the prompt and may '
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
                raise KVPolicyError(f"kv_request_policies={name!r} is no name; put names with spaces between them")
            check_policy_name("kv_request_policies", name)
        return value

    @field_validator("kv_trace_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @field_validator("kv_steering_vectors", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """Flags come as a list of NAME=PATH."""
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
                    f"kv_steering_vectors: {name!r} cannot be a name; use letters, digits, '.', '_' and '-', "
                    f"and not {OFF!r}"
                )
        return {name: str(Path(path).expanduser().absolute()) for name, path in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> KVPolicyConfig:
        check_budget("kv_budget", self.kv_budget, self.policy, self.kv_window)
        for policy in self.policies:
            policy.check_complete()
            check_prompt(policy, self.kv_protect_prompt)
        check_task("kv_policy_config: task_tokens", self.policy, self.kv_window)
        if self.policy.name == "full" and self.kv_policy_config:
            raise KVPolicyError("kv_policy_config is given but kv_policy is 'full', which has no parameters")
        if self.policy.name == "full" and self.kv_request_policies:
            raise KVPolicyError(
                "kv_request_policies is given but kv_policy is 'full', which switches eviction off; start the server "
                'with one of them as --kv-policy and let requests choose "full"'
            )
        steering = {name for name in self.model_fields_set if name.startswith("kv_steering_")}
        changed = {n for n in steering if getattr(self, n) != KVPolicyConfig.model_fields[n].get_default()}
        if not self.kv_steering_vectors and (changed := changed - {"kv_steering_vectors"}):
            flags = ", ".join(flag_names()[name] for name in sorted(changed))
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
    def _repeats(self) -> KVPolicyConfig:
        if REPEATS in self.needs:
            raise KVPolicyError(
                "kv_policy and kv_request_policies compare sentences in two ways, by hidden states and by words, of "
                "which a server can collect one; drop one of the methods"
            )
        return self

    @model_validator(mode="after")
    def _deferral(self) -> KVPolicyConfig:
        if self.kv_defer_prompt and self.kv_protect_prompt:
            raise KVPolicyError(
                "kv_defer_prompt is given but the prompt is protected, so it would do nothing; add "
                "--no-kv-protect-prompt or drop --kv-defer-prompt"
            )
        return self

    @model_validator(mode="after")
    def _scheduling(self) -> KVPolicyConfig:
        if self.kv_batch_grouping == "off":
            defaults = {"kv_grouping_width": GROUPING_WIDTH, "kv_grouping_max_wait": GROUPING_MAX_WAIT}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise KVPolicyError(
                        f"{name}={getattr(self, name)} is given but kv_batch_grouping is 'off', so it would do "
                        "nothing; add --kv-batch-grouping prefill-length"
                    )
        for name, stock in {"kv_batch_grouping": "off", "kv_prefix_eviction": "lru"}.items():
            if getattr(self, name) != stock and not self.is_active:
                raise KVPolicyError(
                    f"{name} is given but kv_policy is 'full' and nothing is steered, which leaves vLLM's "
                    f"scheduler alone; name another --kv-policy or drop {flag_names()[name]}"
                )
        return self

    @functools.cached_property
    def policy(self) -> Policy:
        """The configured method."""
        return make_policy(self.kv_policy, self.kv_policy_config)

    @property
    def policies(self) -> list[Policy]:
        """The configured method and the further ones; who names the configured one among these gets it as it is."""
        further = [name for name in self.kv_request_policies if name != self.kv_policy]
        return [self.policy, *map(make_policy, further)]

    @property
    def evicts(self) -> bool:
        """Whether anything can be evicted on this server."""
        return self.kv_policy != "full"

    @property
    def steers(self) -> bool:
        """Whether a request can be steered on this server."""
        return bool(self.kv_steering_vectors)

    @property
    def is_active(self) -> bool:
        """Whether this server differs from stock vLLM."""
        return self.evicts or self.steers

    def load_vectors(self) -> list[SteeringVector]:
        """The registered vectors, in order; a request's row of the table is the number of its vector, from 1.

        Raises:
            KVPolicyError: a file that is missing or no vector.
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
        """The learned gates of the policy, None where it needs none.

        Raises:
            KVPolicyError: a file that is missing or holds no gates.
        """
        return Gates.load(self.policy.gates_file) if self.needs & Need.GATES else None

    @functools.cached_property
    def needs(self) -> Need:
        """What the runtime of this server collects."""
        needs = Need.NOTHING
        for policy in self.policies:
            needs |= needs_of(policy, self.kv_granularity)
        return needs

    @property
    def num_queries(self) -> int:
        """Newest queries that the workers keep of each request."""
        return max(self.kv_window, NUM_ACCUMULATED if self.needs & ACCUMULATED else 0)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> KVPolicyConfig:
        """Build from flag values.

        Raises:
            KVPolicyError: with one line per bad field.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise KVPolicyError(_describe(error)) from None


class RequestOptions(BaseModel):
    """What a request may set, through `vllm_xargs` or `SamplingParams.extra_args`."""

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
        None, ge=-MAX_ALPHA, le=MAX_ALPHA, allow_inf_nan=False, description="Strength at first. Default: the server's."
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
        """Read and check a request's options; keys that are not ours are left alone.

        Args:
            extra_args: the request's `vllm_xargs` or `extra_args`.
            config: of the server.
            max_model_len: of the model.
            check_names: refuse names that are nearly ours; False where that was done before.

        Raises:
            KVPolicyError: naming the field, the value and what is allowed.
        """
        given = extra_args or {}
        if check_names:
            cls.check_names(given)
        ours = {key: value for key, value in given.items() if key in cls.model_fields}
        try:
            options = cls(**ours)
        except ValidationError as error:
            raise KVPolicyError(_describe(error)) from None
        policy = options.resolve_policy(config)
        options._check_steering(config)
        if policy.name != "full" and not config.evicts:
            raise KVPolicyError(
                f"kv_policy={options.kv_policy!r} is not served here, where nothing is evicted; start the server with "
                "--kv-policy, or choose 'full'"
            )
        policy.check_complete()
        check_prompt(policy, config.kv_protect_prompt)
        check_task("kv_task_tokens", policy, config.kv_window)
        missing = needs_of(policy, config.kv_granularity) & ~(config.needs | IN_THE_CACHE)
        if missing:
            raise KVPolicyError(
                f"kv_policy={options.kv_policy!r} needs {_need_names(missing)}, which this server does not collect; "
                f"start it with --kv-request-policies {options.kv_policy}, or choose {config.kv_policy!r} or 'full'"
            )
        if options.kv_budget is not None:
            check_budget("kv_budget", options.kv_budget, policy, config.kv_window, max_model_len)
        else:
            # The server's budget holds its own method's sinks, which may be fewer.
            check_budget("kv_budget", config.kv_budget, policy, config.kv_window)
        return options

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """Refuse names that are nearly ours: an option that is not understood would be ignored silently.

        Raises:
            KVPolicyError: naming the option that was meant, or the flag where it is set for the whole server.
        """
        # A client may send any number of names of any length: no request has nearly as many, and none is as long.
        for name in itertools.islice(map(str, names), MAX_NAMES):
            is_foreign = len(name) > MAX_NAME_LENGTH or name in cls.model_fields
            meant = None if is_foreign else meant_option(name)
            if meant is None:
                continue
            if meant in cls.model_fields:
                raise KVPolicyError(f"{name!r} is not a request option; did you mean {meant!r}?")
            if meant == CONFIG_KEY:
                problem = "is not a request option; write options side by side, each by its own name"
            else:
                problem = f"is set for the whole server, not for a request; start it with {flag_names()[meant]}"
            raise KVPolicyError(f"{name!r} {problem}. A request may set: {', '.join(cls.model_fields)}")

    def _check_steering(self, config: KVPolicyConfig) -> None:
        if self.steering is not None and not config.steers:
            if self.steering != OFF:
                raise KVPolicyError(
                    f"steering={self.steering!r}: this server has no steering vectors; start it with "
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
                    raise KVPolicyError(
                        f"{field}={getattr(self, field)} is given but this request is not steered; name a vector "
                        f"with 'steering': {', '.join(config.kv_steering_vectors) or 'none is registered'}"
                    )

    def check_streaming(self) -> None:
        """Refuse what a streaming-input session cannot do: its prompt grows, so it keeps everything unsteered.

        Raises:
            KVPolicyError: naming the options.
        """
        harmless = {"kv_policy": "full", "steering": OFF}
        asked = self.model_dump(exclude_none=True)
        if refused := [f"{name}={value!r}" for name, value in asked.items() if value != harmless.get(name)]:
            raise KVPolicyError(
                f"{', '.join(refused)} cannot be had in a streaming-input session, which keeps everything and is not "
                "steered; leave it out, or send the input as separate requests"
            )

    def vector(self, config: KVPolicyConfig) -> str | None:
        """Name of the vector that this request is steered with."""
        name = config.kv_steering_default if self.steering is None else self.steering
        return None if name == OFF else name

    def strength(self, config: KVPolicyConfig) -> Strength:
        """How strongly this request is steered."""
        return Strength(
            config.kv_steering_alpha0 if self.steering_alpha0 is None else self.steering_alpha0,
            config.kv_steering_gamma if self.steering_gamma is None else self.steering_gamma,
            float("inf") if config.kv_steering_alpha_max is None else config.kv_steering_alpha_max,
        )

    def resolve_policy(self, config: KVPolicyConfig) -> Policy:
        """The method of this request: the server's own, or another one with its default parameters."""
        own = self.kv_policy is None or self.kv_policy == config.kv_policy
        policy = config.policy if own else make_policy(str(self.kv_policy))
        return policy if self.kv_task_tokens is None else policy.with_task(self.kv_task_tokens)


@functools.lru_cache(maxsize=4096)
def meant_option(name: str) -> str | None:
    """The option of a request, or else of the server, that a name looks like; None for another's name.

    Upper case, separators and the prefixes `kv` and `skipkv` make no difference, nor does a typing error in a name
    that has such a prefix. `CONFIG_KEY` is the answer for names with our own prefix that look like no option.
    """
    if name in KVPolicyConfig.model_fields:
        return name
    letters, core = _letters(name), _core(name)
    cores, spelt = _options_by(_core), _options_by(_letters)
    if core in cores:
        return cores[core]
    wanted = letters if letters == core else f"kv{core}"
    # The ratio counts letters that match, and these are cheap bounds of their number.
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
    """Whether a name begins with `kv` or `skipkv`, in any spelling."""
    return _letters(name) != _core(name)


@functools.cache
def _options_by(form: Callable[[str], str]) -> dict[str, str]:
    # The options of a request come last, so that they win where the server has one of the same form.
    return {form(name): name for name in (*KVPolicyConfig.model_fields, *RequestOptions.model_fields)}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _core(name: str) -> str:
    return re.sub(r"^(?:(?:skip)?kv)+", "", _letters(name))


def needs_of(policy: Policy, granularity: str) -> Need:
    """What must be collected to run a policy at a granularity."""
    return policy.needs | OPTIONAL_NEEDS[granularity]


def check_budget(field: str, budget: int, policy: Policy, window: int, high: int | None = None) -> None:
    """Raise `KVPolicyError` unless the budget holds the window, the sinks and at least one more token."""
    low = window + policy.num_sinks + policy.num_task(window) + 1
    if budget < low or (high is not None and budget > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        sinks = f" + {policy.num_sinks} sinks" if policy.num_sinks else ""
        if num_task := policy.num_task(window):
            sinks += f" + question of {num_task}"
        raise KVPolicyError(
            f"{field}={budget} is out of range; allowed: {allowed} (window of {window} tokens{sinks} + 1"
            + ("" if high is None else ", up to max_model_len")
            + ")"
        )


def check_prompt(policy: Policy, is_protected: bool) -> None:
    """Raise `KVPolicyError` for a method about the prompt where that is protected."""
    if policy.compacts_prompt and is_protected:
        raise KVPolicyError(
            f"kv_policy={policy.name!r} compacts the prompt, which is protected; start the server with "
            "--no-kv-protect-prompt, or choose a method that evicts what the model writes"
        )


def check_task(field: str, policy: Policy, window: int) -> None:
    """Raise `KVPolicyError` unless the window holds the question: it is scored by queries of the window."""
    if (num_task := policy.num_task(window)) > window:
        raise KVPolicyError(
            f"{field}={num_task} is out of range; allowed: 1 to {window} (kv_window, whose queries are kept); raise "
            "--kv-window or name fewer tokens"
        )


def _need_names(needs: Need) -> str:
    return " and ".join(str(need.name).lower() for need in Need if need in needs)


def _describe(error: ValidationError) -> str:
    """One readable line per failed field: name, value, what is allowed."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, KVPolicyError):
            lines.append(str(cause))
        elif item["type"] == "extra_forbidden":
            lines.append(f"{field} is not an option")
        else:
            lines.append(f"{field}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return "; ".join(lines)


def parse_json_object(flag: str, text: str) -> dict[str, Any]:
    """Read a JSON object from a flag.

    Raises:
        KVPolicyError: text that is not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise KVPolicyError(
            f"{flag}: {text!r} is not valid JSON ({error}); quote it for the shell, e.g. '{{\"recent_share\": 0.4}}'"
        ) from None
    if not isinstance(value, dict):
        raise KVPolicyError(f"{flag}: {text!r} is JSON but not an object; write e.g. '{{\"recent_share\": 0.4}}'")
    return value


@functools.cache
def flag_names() -> dict[str, str]:
    """Field name -> flag, for all fields of `KVPolicyConfig`."""
    return {name: "--" + name.replace("_", "-") for name in KVPolicyConfig.model_fields}


def flags_table() -> str:
    """The flags as a Markdown table, for the README."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in KVPolicyConfig.model_fields.items():
        flag = flag_names()[name].replace("--kv-", "--[no-]kv-") if field.annotation is bool else flag_names()[name]
        default = field.get_default(call_default_factory=True)
        shown = {"None": "off", "True": "on", "False": "off", "[]": "none", "{}": "none"}.get(str(default), default)
        rows.append(f"| `{flag}` | `{shown}` | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(flags_table())
