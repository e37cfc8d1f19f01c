"""Configuration: one pydantic model for the server and one for a request.

They are the only source of the command-line flags, their help, their validation and the table in the
README (`python -m skipkv_vllm.config` prints it).
"""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import KVPolicyError
from .policies import Need, Policy, make_policy, policy_names

CONFIG_KEY = "skipkv"
"""Key of the configuration in vLLM's `additional_config`."""

GROUPING_WIDTH, GROUPING_MAX_WAIT = 256, 5.0

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
    kv_admission: Literal["bounded", "optimistic"] = Field(
        "bounded",
        description='"bounded": a request starts once all the pages it may ever hold fit beside those of the running '
        'ones, so none is ever preempted. "optimistic": it starts once its prompt fits, as in stock vLLM; more run at '
        "once while they are short, and some are preempted and computed again when they grow.",
    )
    kv_policy_config: dict[str, Any] = Field(
        default_factory=dict,
        description='Parameters of the method as JSON, e.g. {"similarity_threshold": 0.95, "mix": 0.1}.',
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
    kv_trace_dir: str | None = Field(
        None, description="Write one replayable <request-id>.safetensors per finished request into this folder."
    )
    kv_check_integrity: bool = Field(
        False, description="Verify all bookkeeping after every step. Slow; for tests and bug reports."
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
            if name not in policy_names():
                raise KVPolicyError(
                    f"kv_request_policies={value}: {name!r} is unknown; name some of: {', '.join(policy_names())}, "
                    "with spaces between them"
                )
        return value

    @field_validator("kv_trace_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())

    @model_validator(mode="after")
    def _consistent(self) -> KVPolicyConfig:
        check_budget("kv_budget", self.kv_budget, self.policy, self.kv_window)
        if self.policy.name == "full" and self.kv_policy_config:
            raise KVPolicyError("kv_policy_config is given but kv_policy is 'full', which has no parameters")
        if self.policy.name == "full" and self.kv_request_policies:
            raise KVPolicyError(
                "kv_request_policies is given but kv_policy is 'full', which switches eviction off; start the server "
                'with one of them as --kv-policy and let requests choose "full"'
            )
        return self

    @model_validator(mode="after")
    def _grouping(self) -> KVPolicyConfig:
        if self.kv_batch_grouping == "off":
            defaults = {"kv_grouping_width": GROUPING_WIDTH, "kv_grouping_max_wait": GROUPING_MAX_WAIT}
            for name, default in defaults.items():
                if getattr(self, name) != default:
                    raise KVPolicyError(
                        f"{name}={getattr(self, name)} is given but kv_batch_grouping is 'off', so it would do "
                        "nothing; add --kv-batch-grouping prefill-length"
                    )
        elif not self.is_active:
            raise KVPolicyError(
                "kv_batch_grouping is given but kv_policy is 'full', which leaves vLLM's scheduler alone; name another "
                "--kv-policy or drop --kv-batch-grouping"
            )
        return self

    @functools.cached_property
    def policy(self) -> Policy:
        """The configured method."""
        return make_policy(self.kv_policy, self.kv_policy_config)

    @property
    def is_active(self) -> bool:
        """Whether anything can be evicted on this server."""
        return self.kv_policy != "full"

    @functools.cached_property
    def needs(self) -> Need:
        """What the runtime of this server collects."""
        needs = needs_of(self.policy, self.kv_granularity)
        for name in self.kv_request_policies:
            needs |= make_policy(name).needs
        return needs

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

    @classmethod
    def parse(cls, extra_args: dict[str, Any] | None, config: KVPolicyConfig, max_model_len: int) -> RequestOptions:
        """Read and check a request's options; keys that are not ours are left alone.

        Raises:
            KVPolicyError: naming the field, the value and what is allowed.
        """
        known = set(cls.model_fields)
        ours = {key: value for key, value in (extra_args or {}).items() if key in known}
        for key in (extra_args or {}).keys() - known:
            if key in KVPolicyConfig.model_fields:
                raise KVPolicyError(
                    f"{key!r} is set for the whole server, not for a request; start it with {flag_names()[key]}. "
                    f"A request may set: {', '.join(cls.model_fields)}"
                )
            if close := difflib.get_close_matches(str(key), known, n=1, cutoff=0.85):
                raise KVPolicyError(f"{key!r} is not a request option; did you mean {close[0]!r}?")
        try:
            options = cls(**ours)
        except ValidationError as error:
            raise KVPolicyError(_describe(error)) from None
        policy = options.resolve_policy(config)
        missing = needs_of(policy, config.kv_granularity) & ~config.needs
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

    def resolve_policy(self, config: KVPolicyConfig) -> Policy:
        """The method of this request: the server's own, or another one with its default parameters."""
        if self.kv_policy is None or self.kv_policy == config.kv_policy:
            return config.policy
        return make_policy(self.kv_policy)


def needs_of(policy: Policy, granularity: str) -> Need:
    """What must be collected to run a policy at a granularity."""
    return policy.needs | OPTIONAL_NEEDS[granularity]


def check_budget(field: str, budget: int, policy: Policy, window: int, high: int | None = None) -> None:
    """Raise `KVPolicyError` unless the budget holds the window, the sinks and at least one more token."""
    low = window + policy.num_sinks + 1
    if budget < low or (high is not None and budget > high):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        sinks = f" + {policy.num_sinks} sinks" if policy.num_sinks else ""
        raise KVPolicyError(
            f"{field}={budget} is out of range; allowed: {allowed} (window of {window} tokens{sinks} + 1"
            + ("" if high is None else ", up to max_model_len")
            + ")"
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
            f"{flag}: {text!r} is not valid JSON ({error}); quote it for the shell, e.g. '{{\"mix\": 0.1}}'"
        ) from None
    if not isinstance(value, dict):
        raise KVPolicyError(f"{flag}: {text!r} is JSON but not an object; write e.g. '{{\"mix\": 0.1}}'")
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
        shown = {"None": "off", "True": "on", "False": "off", "[]": "none"}.get(str(default), default)
        rows.append(f"| `{flag}` | `{shown}` | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(flags_table())
