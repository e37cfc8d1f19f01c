"""The grid of a run: policies x budgets x batch sizes x steering, and all other settings that decide the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from skipkv_vllm.core.limits import Limits
from skipkv_vllm.evaluation.figures import FULL

from . import UsageError


class Arm(NamedTuple):
    """One cell of the grid: a policy at a budget of tokens (0 for `full`), a batch size and, if any, a `Steer`."""

    policy: str
    budget: int
    batch_size: int
    steering: str = ""

    def __str__(self) -> str:
        steered = f", steered by {self.steering}" if self.steering else ""
        return f"{self.policy}{f' at {self.budget}' if self.budget else ''}, batch {self.batch_size}{steered}"


class Steer(NamedTuple):
    """A way to steer: a registered vector and its strength, for all policies or only one."""

    vector: str
    alpha0: float
    gamma: float = 0.0
    policy: str | None = None

    @classmethod
    def parse(cls, text: str) -> Steer:
        """Read `[POLICY/]VECTOR:ALPHA0[:GAMMA]`.

        Raises:
            UsageError: something else.
        """
        policy, slash, rest = text.rpartition("/")
        vector, *numbers = rest.split(":")
        try:
            alpha0, gamma = map(float, numbers if len(numbers) == 2 else (*numbers, "0"))
        except ValueError:
            raise UsageError(
                f"--steering {text!r} is not [POLICY/]VECTOR:ALPHA0[:GAMMA]; write e.g. math:1 (static), math:1:0.02 "
                "(grows with the number of doubts) or skipkv/math:1:0.02 (with that policy only)"
            ) from None
        return cls(vector, alpha0, gamma, policy if slash else None)

    def __str__(self) -> str:
        """Leave out the policy, which the arm names."""
        return f"{self.vector}:{self.alpha0:g}:{self.gamma:g}"


@dataclass(frozen=True)
class Budget:
    """A budget as given: tokens (`512`), or a share (`25%`) of the mean generated length of `full`."""

    text: str

    def __post_init__(self) -> None:
        number = self.text.removesuffix("%")
        try:
            valid = 0 < float(number) <= 100 if self.is_share else int(number) >= 2
        except ValueError:
            valid = False
        if not valid:
            raise UsageError(
                f"--budgets {self.text!r} is neither a number of tokens (at least 2, e.g. 512) nor a share of the "
                "mean generated length of full KV (above 0%, up to 100%, e.g. 25%)"
            )

    @property
    def is_share(self) -> bool:
        """Whether full KV must run first."""
        return self.text.endswith("%")

    def tokens(self, mean_length: float | None) -> int:
        """The budget in tokens.

        Args:
            mean_length: mean generated length of full KV; only a share needs it.
        """
        if not self.is_share:
            return int(self.text)
        assert mean_length is not None
        return max(2, round(mean_length * float(self.text[:-1]) / 100))


@dataclass(frozen=True)
class Settings:
    """One run. When a run is resumed, fields of the grid may be extended; all others must stay.

    Attributes:
        model: path or name.
        data: name of the data set.
        policies, budgets, batch_sizes: the grid; a batch size is the `max_num_seqs` of its engine.
        split, jsonl: see `tasks.load_tasks`.
        problems: how many; None for all.
        problems_at: batch size -> fewer problems at that batch size.
        samples: per problem.
        temperature, top_p, seed: of sampling; temperature 0 is greedy.
        max_tokens: generated at most, per sample.
        buffer, window, granularity, protect_prompt, policy_config: `kv_...` options of the engine; the last
            belongs to the first policy that is not `full`.
        separate_arms: run one arm after the other, so that each has a time of its own.
        engine: further arguments of `vllm.LLM`.
        own: policy -> its values of `OWN`; it is served by an engine of its own, because others cannot share them.
        vectors: name -> file of the steering vectors.
        steering: every policy and budget is also run with each of these, see `Steer.parse`.
    """

    model: str
    data: str
    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    split: str | None = None
    jsonl: str | None = None
    problems: int | None = None
    problems_at: dict[int, int] = field(default_factory=dict)
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 8192
    buffer: int = 128
    window: int = 8
    granularity: str = "head"
    protect_prompt: bool = True
    policy_config: dict[str, Any] = field(default_factory=dict)
    separate_arms: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    vectors: dict[str, str] = field(default_factory=dict)
    steering: tuple[str, ...] = ()

    GROWS = ("policies", "budgets", "batch_sizes", "steering")
    OWN = ("policy_config", "protect_prompt")

    def __post_init__(self) -> None:
        for flag, values in (("--policies", self.policies), ("--batch-sizes", self.batch_sizes)):
            if not values or len(set(values)) < len(values):
                raise UsageError(f"{flag} {' '.join(map(str, values))!r}: give at least one, and each once")
        for flag, value in (("--samples", self.samples), ("--max-tokens", self.max_tokens), ("--buffer", self.buffer)):
            _check_at_least(flag, value, 1)
        if self.problems is not None:
            _check_at_least("--problems", self.problems, 1)
        for size in self.batch_sizes:
            _check_at_least("--batch-sizes", size, 1)
        for size, count in self.problems_at.items():
            _check_at_least(f"--problems-at {size}", count, 1)
            if size not in self.batch_sizes:
                allowed = ", ".join(map(str, self.batch_sizes))
                raise UsageError(f"--problems-at {size}={count}: {size} is not one of --batch-sizes: {allowed}")
        if self.temperature < 0:
            raise UsageError(f"--temperature {self.temperature} is negative; 0 is greedy, R1 models use 0.6")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} is out of range; allowed: above 0, up to 1")
        if self.samples > 1 and self.temperature == 0:
            raise UsageError(
                f"--samples {self.samples} with --temperature 0 would give {self.samples} equal samples; "
                "set a temperature, e.g. 0.6, or --samples 1"
            )
        parsed = [Budget(text) for text in self.budgets]
        if self.evicting and not parsed:
            raise UsageError(f"--budgets is empty, but {', '.join(self.evicting)} needs one, e.g. --budgets 25% 512")
        if any(budget.is_share for budget in parsed) and FULL not in self.policies:
            raise UsageError(
                "--budgets with % are shares of the length of full KV; add full to --policies, or give tokens"
            )
        for text in self.steering:
            self._check_steering(text)
        for name, own in self.own.items():
            if name == FULL or name not in self.policies:
                raise UsageError(f"--own: {name!r} is not one of the evicting --policies")
            if not isinstance(own, dict) or set(own) - set(self.OWN):
                raise UsageError(f"--own: {name}={own!r} may have {', '.join(self.OWN)}, and nothing else")

    def _check_steering(self, text: str) -> None:
        steer = Steer.parse(text)
        if steer.vector not in self.vectors:
            known = ", ".join(self.vectors) or "none, give --steering-vectors NAME=FILE"
            raise UsageError(f"--steering {text!r}: {steer.vector!r} is not registered; there is {known}")
        if steer.policy not in (None, *self.policies):
            raise UsageError(f"--steering {text!r}: {steer.policy!r} is not one of --policies")

    @property
    def evicting(self) -> tuple[str, ...]:
        """The policies that are not `full`."""
        return tuple(name for name in self.policies if name != FULL)

    @property
    def shared(self) -> Settings:
        """Settings of the shared engine: all policies except those that have an engine of their own."""
        policies = tuple(name for name in self.policies if name not in self.own) or (FULL,)
        return replace(self, policies=policies, own={}) if self.own else self

    def of(self, policy: str) -> Settings:
        """Settings of the engine that serves only this policy."""
        alone = tuple(name for name in self.policies if name in (FULL, policy))
        return replace(self, policies=alone, own={}, steering=(), **self.own[policy])

    def count(self, batch_size: int, available: int) -> int:
        """Problems at a batch size."""
        return min(self.problems_at.get(batch_size, available), available)

    def tokens(self, mean_length: float | None) -> dict[str, int]:
        """Budget as given -> tokens.

        Raises:
            UsageError: two budgets are the same number of tokens.
        """
        resolved = {text: Budget(text).tokens(mean_length) for text in self.budgets}
        if len(set(resolved.values())) < len(resolved):
            raise UsageError(f"--budgets: some are the same number of tokens, give each once: {resolved}")
        return resolved

    def arms(self, batch_size: int, budgets: Sequence[int]) -> list[Arm]:
        """All arms of a batch size except plain `full`: budget by budget, then each way to steer."""
        evicting = [Arm(policy, budget, batch_size) for budget in budgets for policy in self.evicting]
        plain = [Arm(FULL, 0, batch_size)] * (FULL in self.policies) + evicting
        steers = [Steer.parse(text) for text in self.steering]
        return evicting + [
            arm._replace(steering=str(steer)) for steer in steers for arm in plain if steer.policy in (None, arm.policy)
        ]

    def limits(self, policy: str, budget: int, prompt_tokens: int) -> Limits:
        """The limits of a request."""
        protects = self.own.get(policy, {}).get("protect_prompt", self.protect_prompt)
        return Limits(budget, self.buffer, self.window, prompt_tokens if protects else 0)

    def to_json(self) -> dict[str, Any]:
        """For `run_info.json`; `from_json` reads it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return values | {"problems_at": {str(size): count for size, count in self.problems_at.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """Read what `to_json` wrote."""
        changed: dict[str, Any] = {key: tuple(values[key]) for key in cls.GROWS if key in values}
        changed["problems_at"] = {int(size): count for size, count in values["problems_at"].items()}
        return cls(**values | changed)


def _check_at_least(flag: str, value: int, low: int) -> None:
    if value < low:
        raise UsageError(f"{flag} {value} is out of range; allowed: at least {low}")
