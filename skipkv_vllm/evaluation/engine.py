"""Requests on engines in child processes, with prompts that may be evicted like any other text."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import KVPolicyConfig, check_budget
from ..core.errors import KVPolicyError
from ..core.limits import Limits
from ..core.needs import Need
from ..policies import check_policy_name, make_policy
from .children import Child, Finished, attended
from .figures import FULL

if TYPE_CHECKING:
    from ..integration.llm import LLM

CHUNK = 256
"""Most tokens of a request in one step. Every request gets as many whatever else runs, so results do not depend on
which texts run together."""

RANDOM_SINKS = 64
"""First tokens that `random` keeps by default. Prompts are not protected here, and a random baseline that evicts the
beginning of a text would be too easy to beat."""


@dataclass(frozen=True)
class Setup:
    """Settings of all engines of a run.

    Attributes:
        model: path or name.
        longest: tokens of the longest request, including its answer.
        buffer, window, granularity: `kv_...` options.
        configs: method -> its `kv_policy_config`.
        num_seqs: requests at once.
        arguments: further arguments of `vllm.LLM`.
    """

    model: str
    longest: int
    buffer: int = 128
    window: int = 8
    granularity: str = "head"
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_seqs: int = 8
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def bound(self, budget: int) -> int:
        """Return the tokens that a request holds when it is compacted."""
        return Limits(budget, self.buffer, self.window, 0).bound

    def check(self, methods: Sequence[str], budgets: Iterable[int], flag: str = "--budgets") -> None:
        """Raise `KVPolicyError` for an unknown method, bad parameters, or a budget (given by `flag`) out of range."""
        for method in methods:
            check_policy_name("--methods", method)
        if unused := sorted(set(self.configs) - set(methods)):
            raise KVPolicyError(f"--policy-config: {', '.join(unused)} is not one of --methods {' '.join(methods)}")
        for method in methods:
            policy = make_policy(method, dict(self.configs.get(method, {})))
            if policy.needs & Need.GATES and not policy.gates_file:
                example = json.dumps({method: {"gates": "/path/to/gates.safetensors"}})
                raise KVPolicyError(f"--methods {method}: needs the gates of --model; add --policy-config '{example}'")
        for group in self.groups(methods):
            KVPolicyConfig.parse(self.policy_arguments(group))
        for method in methods:
            policy = make_policy(method, dict(self.configs.get(method, {})))
            for budget in budgets:
                check_budget(f"{method}: {flag}", budget, policy, self.window)

    def groups(self, methods: Sequence[str]) -> list[list[str]]:
        """Group methods by the engine that serves them.

        Only the first method of a group may have parameters: a request chooses a method, but not its parameters.
        """
        with_parameters = [method for method in methods if self.configs.get(method)]
        groups = [[method] for method in with_parameters] or [[]]
        groups[0] += [method for method in methods if method not in with_parameters]
        return groups

    def policy_arguments(self, group: Sequence[str]) -> dict[str, Any]:
        """Return the `kv_...` arguments of the engine that serves a group."""
        own, *others = group
        return {
            "kv_policy": own,
            "kv_policy_config": dict(self.configs.get(own, {})),
            "kv_request_policies": others,
            "kv_buffer": self.buffer,
            "kv_window": self.window,
            "kv_granularity": self.granularity,
            "kv_protect_prompt": False,
        }

    def engine_arguments(self, group: Sequence[str]) -> dict[str, Any]:
        """Return all arguments of `skipkv_vllm.LLM` except the model."""
        # vLLM returns no log probabilities for cached prompts.
        return {
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "enforce_eager": True,
            "max_model_len": self.longest,
            "max_num_seqs": self.num_seqs,
            "max_num_batched_tokens": CHUNK * self.num_seqs,
            "long_prefill_token_threshold": CHUNK,
            **self.policy_arguments(group),
            **self.arguments,
        }


def with_fair_random(methods: Sequence[str], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the parameters of all methods, with `RANDOM_SINKS` for `random` unless it has others."""
    found = {method: dict(config) for method, config in configs.items()}
    if "random" in methods:
        found["random"] = {"sinks": RANDOM_SINKS} | found.get("random", {})
    return found


@dataclass(frozen=True)
class Job:
    """A request.

    Attributes:
        key: returned with the result.
        method: of eviction, or "full".
        budget: in tokens; ignored for "full".
        tokens: n token ids of the prompt.
        num_new: tokens to generate greedily.
        top: number of most likely tokens whose log probabilities are returned at every position of the prompt; None
            for no log probabilities.
    """

    key: str
    method: str
    budget: int
    tokens: Sequence[int]
    num_new: int = 1
    top: int | None = None


@dataclass(frozen=True)
class Scores:
    """Log probabilities of tokens 1 to n - 1 of a text; row i is about token i + 1, as predicted from token i.

    Attributes:
        tokens: int32 `[n - 1, 1 + top]`; the next token of the text, then the most likely ones, best first.
        logprobs: float32 `[n - 1, 1 + top]`; their log probabilities.
    """

    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Done:
    """A finished request: the generated tokens, the number of compactions, and the requested scores."""

    key: str
    new_tokens: list[int]
    compactions: int
    scores: Scores | None = None


Answer = Callable[[Sequence[Job]], Iterator[Done]]
"""Runs jobs and yields each result as soon as it is finished."""


@contextlib.contextmanager
def serve(setup: Setup, group: Sequence[str], log: Path) -> Iterator[Answer]:
    """Run an engine in a child process, started by the first jobs.

    Args:
        setup: of the run.
        group: methods to serve; see `Setup.groups`.
        log: file for the engine's output.

    Raises:
        RunError: the engine failed.
    """
    child: Child | None = None

    def answer(jobs: Sequence[Job]) -> Iterator[Done]:
        nonlocal child
        child = child or Child(_body, (setup, list(group), log), log)
        child.connection.send(list(jobs))
        while not isinstance(message := child.receive(), Finished):
            yield message

    patience = 0.0
    try:
        yield answer
        patience = 20.0
    finally:
        if child is not None:
            if patience:
                child.ask_to_end()
            child.end(patience)


def _body(connection: Connection, setup: Setup, group: list[str], log: Path) -> None:
    """Answer lists of jobs until None arrives; runs in the child."""
    with attended(connection, log):
        # vLLM reads these when it is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import torch

        from .. import LLM

        arguments = setup.engine_arguments(group)
        llm = LLM(setup.model, **arguments)
        # vLLM compiles a helper for log probabilities even if the model runs eagerly, which takes a minute.
        with torch.compiler.set_stance("force_eager" if arguments["enforce_eager"] else "default"):
            while (jobs := connection.recv()) is not None:
                for done in run(llm, jobs, setup.num_seqs):
                    connection.send(done)
                connection.send(Finished())
        llm.llm_engine.engine_core.shutdown()


def run(llm: LLM, jobs: Sequence[Job], num_seqs: int) -> Iterator[Done]:
    """Run jobs on an engine in this process.

    Args:
        llm: with prefix caching off.
        jobs: with different keys.
        num_seqs: requests at once.
    """
    engine = llm.llm_engine
    waiting = list(reversed(jobs))
    running: dict[str, Job] = {}
    while waiting or running:
        while waiting and len(running) < 2 * num_seqs:
            job = waiting.pop()
            running[job.key] = job
            engine.add_request(job.key, {"prompt_token_ids": list(job.tokens)}, _sampling(job))
        for output in engine.step():
            if output.finished:
                yield _read(output, running.pop(output.request_id))


def _sampling(job: Job) -> Any:
    from ..integration.llm import sampling_params

    return sampling_params(
        {"kv_policy": job.method} | ({} if job.method == FULL else {"kv_budget": job.budget}),
        max_tokens=job.num_new,
        temperature=0.0,
        prompt_logprobs=job.top,
        flat_logprobs=True,
        detokenize=False,
    )


def _read(output: Any, job: Job) -> Done:
    report = (output.kv_transfer_params or {}).get("skipkv", {})
    applied = report.get("policy", FULL)
    if applied != job.method and (report or job.method != FULL):
        raise RuntimeError(f"{job.key}: {job.method} was requested, but {applied} was applied")
    scores = None
    if job.top is not None:
        flat, shape = output.prompt_logprobs, (len(job.tokens) - 1, 1 + job.top)
        scores = Scores(
            np.array(flat.token_ids, np.int32).reshape(shape), np.array(flat.logprobs, np.float32).reshape(shape)
        )
    return Done(job.key, list(output.outputs[0].token_ids), report.get("compactions", 0), scores)
