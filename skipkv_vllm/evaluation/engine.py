"""Requests on engines in child processes, with prompts that may be evicted like any other text."""

from __future__ import annotations

import contextlib
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
from ..policies import check_policy_name, make_policy
from .children import Child, Finished, attended
from .figures import FULL

if TYPE_CHECKING:
    import vllm

CHUNK = 256
"""Tokens of a request in one step at most. As long as every request gets as many, whatever else runs, results do not
depend on which texts run together."""

RANDOM_SINKS = 64
"""First tokens that `random` protects unless told otherwise. Prompts are not protected here, and random eviction that
also loses a text's beginning would be a baseline that anything beats."""


@dataclass(frozen=True)
class Setup:
    """What the engines of a run have in common.

    Attributes:
        model: path or name.
        longest: tokens of the longest request, its answer included.
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
        """Tokens that a request holds when it is compacted."""
        return Limits(budget, self.buffer, self.window, 0).bound

    def check(self, methods: Sequence[str], budgets: Iterable[int], flag: str = "--budgets") -> None:
        """Raise `KVPolicyError` for an unknown method, bad parameters, or a budget (given by `flag`) out of range."""
        for method in methods:
            check_policy_name("--methods", method)
        if unused := sorted(set(self.configs) - set(methods)):
            raise KVPolicyError(f"--policy-config: {', '.join(unused)} is not one of --methods {' '.join(methods)}")
        for group in self.groups(methods):
            KVPolicyConfig.parse(self.policy_arguments(group))
        for method in methods:
            policy = make_policy(method, dict(self.configs.get(method, {})))
            for budget in budgets:
                check_budget(f"{method}: {flag}", budget, policy, self.window)

    def groups(self, methods: Sequence[str]) -> list[list[str]]:
        """Methods by the engine that serves them.

        Only the first of a group may have parameters, as a request chooses a method but no parameters of it.
        """
        with_parameters = [method for method in methods if self.configs.get(method)]
        groups = [[method] for method in with_parameters] or [[]]
        groups[0] += [method for method in methods if method not in with_parameters]
        return groups

    def policy_arguments(self, group: Sequence[str]) -> dict[str, Any]:
        """The `kv_...` arguments of the engine that serves a group."""
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
        """All arguments of `skipkv_vllm.LLM`, but the model."""
        # Cached prompts have no log probabilities.
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
    """The parameters of all methods, with `RANDOM_SINKS` for `random` unless it is given other ones."""
    found = {method: dict(config) for method, config in configs.items()}
    if "random" in methods:
        found["random"] = {"sinks": RANDOM_SINKS} | found.get("random", {})
    return found


@dataclass(frozen=True)
class Job:
    """A request.

    Attributes:
        key: comes back with the result.
        method: of eviction, or "full".
        budget: tokens; of no meaning for "full".
        tokens: n token ids of the prompt.
        num_new: tokens to generate, greedily.
        top: most likely tokens whose log probabilities are wanted at every position of the prompt; None for no log
            probabilities at all.
    """

    key: str
    method: str
    budget: int
    tokens: Sequence[int]
    num_new: int = 1
    top: int | None = None


@dataclass(frozen=True)
class Scores:
    """Log probabilities of the tokens 1 to n-1 of a text; row i is about token i + 1, as predicted from token i.

    Attributes:
        tokens: int32 `[n - 1, 1 + top]`; the token that follows in the text, then the most likely ones, best first.
        logprobs: float32 `[n - 1, 1 + top]`, theirs.
    """

    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Done:
    """A finished request: what was generated, how often it was compacted, and the scores asked for."""

    key: str
    new_tokens: list[int]
    compactions: int
    scores: Scores | None = None


Answer = Callable[[Sequence[Job]], Iterator[Done]]
"""Runs jobs and yields each result as soon as it is there."""


@contextlib.contextmanager
def serve(setup: Setup, group: Sequence[str], log: Path) -> Iterator[Answer]:
    """An engine in a child process; it is started by the first jobs.

    Args:
        setup: of the run.
        group: methods to serve; see `Setup.groups`.
        log: file for what the engine prints.

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
    """The child: answers lists of jobs until it gets None."""
    with attended(connection, log):
        # Read when vLLM is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import torch

        from .. import LLM

        arguments = setup.engine_arguments(group)
        llm = LLM(setup.model, **arguments)
        # vLLM compiles a helper for log probabilities even where the model runs eagerly, which takes a minute.
        with torch.compiler.set_stance("force_eager" if arguments["enforce_eager"] else "default"):
            while (jobs := connection.recv()) is not None:
                for done in run(llm, jobs, setup.num_seqs):
                    connection.send(done)
                connection.send(Finished())
        llm.llm_engine.engine_core.shutdown()


def run(llm: vllm.LLM, jobs: Sequence[Job], num_seqs: int) -> Iterator[Done]:
    """Run jobs on an engine of this process.

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
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=job.num_new,
        temperature=0.0,
        prompt_logprobs=job.top,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={"kv_policy": job.method} | ({} if job.method == FULL else {"kv_budget": job.budget}),
    )


def _read(output: Any, job: Job) -> Done:
    report = (output.kv_transfer_params or {}).get("skipkv", {})
    applied = report.get("policy", FULL)
    if applied != job.method and (report or job.method != FULL):
        raise RuntimeError(f"{job.key}: asked for {job.method}, but {applied} was applied")
    scores = None
    if job.top is not None:
        flat, shape = output.prompt_logprobs, (len(job.tokens) - 1, 1 + job.top)
        scores = Scores(
            np.array(flat.token_ids, np.int32).reshape(shape), np.array(flat.logprobs, np.float32).reshape(shape)
        )
    return Done(job.key, list(output.outputs[0].token_ids), report.get("compactions", 0), scores)
