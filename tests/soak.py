"""Random traffic on a real engine: mixed methods, budgets and lengths, shared prompts, aborts and resets at any moment.

`make soak` runs thousands of requests, `tests/regression/test_load.py` a few in every test run. All
page bookkeeping is verified in every step, and afterwards nothing may be left of any request. Requests repeat each
other's text, and some are asked again alone at the end: an answer must not depend on who else was there.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from skipkv_vllm import bundled_gates, bundled_vector
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.policies import policy_names
from tests import conftest, harness  # noqa: F401  conftest sets the environment of engines in this process
from tests.draft_models import DRAFTERS
from tests.random_models import FAMILIES, model_of

if TYPE_CHECKING:
    import vllm
    from vllm import RequestOutput

BUDGETS = [None, None, 40, 96, 160]
BUFFER = 32
ARGUMENTS: dict[str, Any] = {
    "kv_budget": 64,
    "kv_buffer": BUFFER,
    "kv_trace_dir": None,
    "max_num_seqs": 100,
    "max_num_batched_tokens": 512,
    "max_model_len": 512,
    "async_scheduling": True,
    "kv_steering_vectors": [f"doubts={bundled_vector()}"],
}
ENGINES: dict[str, dict[str, Any]] = {
    # Requests wait for blocks, and shared prompts stay shared.
    "bounded": ARGUMENTS | {"num_gpu_blocks_override": 512},
    # Requests preempt each other, and rewrite prompts that others share.
    "optimistic": ARGUMENTS
    | {"num_gpu_blocks_override": 128, "kv_admission": "optimistic", "kv_protect_prompt": False},
    # Learned gates read the tokens of every request, and some requests compute tokens ahead.
    "gated": ARGUMENTS
    | {
        "num_gpu_blocks_override": 512,
        "kv_protect_prompt": False,
        "kv_policy": "trimkv",
        "kv_policy_config": {"gates": bundled_gates()},
        "kv_request_policies": ["finch", "laq", "thinkv", "skipkv", "h2o"],
        "kv_steering_vectors": [],
    },
}
ENGINES["recall"] = ENGINES["bounded"] | {
    "kv_protect_prompt": False,
    "kv_request_policies": ["h2o", "snapkv", "random"],
    "kv_recall_memory": 0.25,  # enough, because an answer must not depend on the others
    "kv_recall_interval": 16,
    "kv_recall_threshold": 0.05,
}
SPECULATIVE = ARGUMENTS | {
    "num_gpu_blocks_override": 512,
    "kv_request_policies": ["h2o", "snapkv", "random", "thinkv"],
}
"""of an engine with speculative decoding; see `draft_models`"""
SPECIAL = ARGUMENTS | {
    "num_gpu_blocks_override": 512,
    "kv_steering_vectors": [],
    "kv_request_policies": ["h2o", "snapkv", "random"],
}
"""of an engine whose model has layers with a sliding window or a state; see `random_models`"""
MOST_AT_ONCE = 60
"""requests in the engine, more than the blocks suffice for"""


@dataclass(frozen=True)
class Wanted:
    """A request before it is sent.

    Attributes:
        prompt: token ids.
        options: `extra_args`.
        max_tokens: tokens to generate.
        abort_after: steps after which it is aborted, None if it may finish.
    """

    prompt: list[int]
    options: dict[str, Any]
    max_tokens: int
    abort_after: int | None


@dataclass
class Report:
    """Counts of a soak.

    Attributes:
        requests, finished, aborted: how many; the others add up to the first.
        steps: of the engine.
        tokens: generated.
        compactions: carried out by the worker.
        compacted_requests: finished requests that were compacted, of `evicting_requests` that might have been.
        steered_tokens: of finished requests.
        preemptions: of requests, for want of blocks.
        resets: of the prefix cache.
        restarts: of requests that ran when it was reset.
        shared_tokens: prompt tokens that were found in the prefix cache.
        repeated: requests whose answer was compared with one to the same request in other company.
        seconds: of wall time.
    """

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    steps: int = 0
    tokens: int = 0
    compactions: int = 0
    compacted_requests: int = 0
    evicting_requests: int = 0
    steered_tokens: int = 0
    preemptions: int = 0
    resets: int = 0
    restarts: int = 0
    shared_tokens: int = 0
    repeated: int = 0
    seconds: float = 0.0


@dataclass
class Soak:
    """Sends random requests to an engine.

    Args:
        llm: an engine in this process that checks its integrity.
        seed: of everything that is random.
        abort_share: share of the requests that are aborted.
        reset_share: share of the steps before which the prefix cache is reset.
        repeats: finished requests that are asked again at the end, alone.
    """

    llm: vllm.LLM
    seed: int = 0
    abort_share: float = 0.15
    reset_share: float = 0.02
    repeats: int = 8
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._config: KVPolicyConfig = harness.scheduler_of(self.llm).kv_policy
        self._policies = ["skipkv", "skipkv"] + [name for name in policy_names() if serves(self._config, name)]
        self._texts = harness.demo_prompts(12) + harness.demo_prompts(4, at_least=100)
        self._answered: list[tuple[Wanted, list[int]]] = []
        self._first: dict[str, list[int]] = {}
        self._restarts: Counter[str] = Counter()

    def run(self, num_requests: int) -> Report:
        """Send this many requests, and check that nothing of them remains.

        Raises:
            AssertionError: a block or a row was lost, a request exceeded its bound, or an answer changed.
        """
        began, before = time.monotonic(), num_compactions(self.llm)
        self._send(num_requests)
        self._ask_again()
        drain(self.llm)
        check_nothing_left(self.llm)
        self.report.compactions = num_compactions(self.llm) - before
        self.report.seconds = round(time.monotonic() - began, 1)
        return self.report

    # ---- requests

    def _draw(self) -> Wanted:
        chance = self._chance
        prompt = list(chance.choice(self._texts))
        kind = chance.random()
        if kind < 0.3:
            # The same text up to a point, within a block or at its end.
            prompt = prompt[: chance.randrange(16, len(prompt))] + list(chance.choice(self._texts))[-12:]
        elif kind < 0.5 and self._answered:
            # A conversation continues after a partly evicted answer.
            wanted, answer = chance.choice(self._answered)
            prompt = (wanted.prompt + answer)[:220] + list(chance.choice(self._texts))[-12:]
        options: dict[str, Any] = {"kv_policy": chance.choice(self._policies)}
        budget = chance.choice(BUDGETS)
        if budget is not None and options["kv_policy"] != "full":
            options["kv_budget"] = budget
        if chance.random() < 0.15 and self._config.steers:
            options["steering"] = "doubts"
        max_tokens = chance.randrange(60, 140)
        abort_after = chance.randrange(max_tokens) if chance.random() < self.abort_share else None
        return Wanted(prompt, options, max_tokens, abort_after)

    def _add(self, name: str, wanted: Wanted) -> str:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=wanted.max_tokens, temperature=0.0, ignore_eos=True, extra_args=wanted.options
        )
        return self.llm.llm_engine.add_request(name, {"prompt_token_ids": wanted.prompt}, params)

    def _send(self, num_requests: int) -> None:
        engine, scheduler, report = self.llm.llm_engine, harness.scheduler_of(self.llm), self.report
        running: dict[str, tuple[str, Wanted, int]] = {}
        preemptions: Counter[str] = Counter()
        while report.requests < num_requests or running:
            # They come in bursts.
            for _ in range(self._chance.choice([0, 0, 0, 0, 1, 2, 30])):
                if report.requests < num_requests and len(running) < MOST_AT_ONCE:
                    name, wanted = str(report.requests), self._draw()
                    running[name] = self._add(name, wanted), wanted, report.steps
                    report.requests += 1
            late = [
                n
                for n, (_, w, at) in running.items()
                if w.abort_after is not None and report.steps - at > w.abort_after
            ]
            engine.abort_request([running.pop(name)[0] for name in late], internal=True)
            report.aborted += len(late)
            if self._chance.random() < self.reset_share:
                self._reset()
            for output in engine.step():
                if output.finished and output.request_id in running:
                    _, wanted, _ = running.pop(output.request_id)
                    self._finished(wanted, output)
            for request in scheduler.requests.values():
                preemptions[request.request_id] = max(preemptions[request.request_id], request.num_preemptions)
            report.steps += 1
        report.restarts = self._restarts.total()
        report.preemptions = (preemptions - self._restarts).total()

    def _reset(self) -> None:
        """Reset the prefix cache, often although requests run: vLLM declines, or they compute everything again."""
        restarts, running = self._chance.random() < 0.2, list(harness.scheduler_of(self.llm).running)
        done = self.llm.reset_prefix_cache(reset_running_requests=restarts)
        assert done or not restarts
        self.report.resets += done
        if restarts:
            self._restarts.update(request.request_id for request in running)

    def _finished(self, wanted: Wanted, output: RequestOutput) -> None:
        report, answer = self.report, list(output.outputs[0].token_ids)
        assert len(answer) == wanted.max_tokens, f"{wanted} got {len(answer)} tokens"
        self._answered.append((wanted, answer))
        self._compare(wanted, answer)
        report.finished += 1
        report.tokens += len(answer)
        report.shared_tokens += output.num_cached_tokens or 0
        told = (output.kv_transfer_params or {}).get("skipkv", {})
        report.steered_tokens += told.get("steering", {}).get("steered_tokens", 0)
        if wanted.options["kv_policy"] != "full":
            report.evicting_requests += 1
            report.compacted_requests += told["compactions"] > 0

    def _ask_again(self) -> None:
        engine = self.llm.llm_engine
        again = self._chance.sample(self._answered, min(self.repeats, len(self._answered)))
        for number, (wanted, _) in enumerate(again):
            assert self.llm.reset_prefix_cache()
            self._add(f"again {number}", wanted)
            outputs = []
            while engine.has_unfinished_requests():
                outputs += engine.step()
            self._compare(wanted, list(outputs[-1].outputs[0].token_ids))

    def _compare(self, wanted: Wanted, answer: list[int]) -> None:
        """An answer must begin like every other answer to the same question with the same options."""
        first = self._first.setdefault(repr((wanted.prompt, wanted.options)), answer)
        if first is not answer:
            assert all(a == b for a, b in zip(first, answer, strict=False)), f"{wanted} got {first} and {answer}"
            self.report.repeated += 1


def serves(config: KVPolicyConfig, name: str) -> bool:
    """Return whether a server lets a request choose a method."""
    try:
        RequestOptions.parse({"kv_policy": name}, config, ARGUMENTS["max_model_len"])
    except KVPolicyError:
        return False
    return True


def runner_of(llm: vllm.LLM) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def runtime_of(llm: vllm.LLM) -> Any:
    """The worker's `EvictionRuntime` of an engine in this process."""
    return runner_of(llm).runtime


def num_compactions(llm: vllm.LLM) -> int:
    """Return the number of compactions, which the worker and the scheduler must agree on."""
    scheduler, runtime = harness.scheduler_of(llm), runtime_of(llm)
    assert scheduler.eviction.stats._counts.get("compactions", 0) == runtime.num_compactions
    return runtime.num_compactions


def drain(llm: vllm.LLM) -> None:
    """Run the engine until the workers know of the requests that ended last."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.batch_queue:
        llm.llm_engine.step()


def check_nothing_left(llm: vllm.LLM) -> None:
    """Check that every block is free and that neither scheduler nor worker remembers a request."""
    harness.assert_pool_empty(llm)
    scheduler, runtime = harness.scheduler_of(llm), runtime_of(llm)
    scheduler.check_integrity()
    manager, runner = scheduler.block_manager, llm.llm_engine.engine_core.engine_core.model_executor
    runner = runner.driver_worker.worker.model_runner
    ledger, signals = manager.ledger, runtime.signals
    left = {
        "scheduler": [scheduler.requests, scheduler.eviction.requests],
        "blocks": [manager.req_to_blocks, manager.num_cached_block, manager._lookahead_blocks],
        "other groups": [table for other in manager._others for table in (other.req_to_blocks, other.num_cached_block)],
        "ledger": [ledger._num_holders],
        "worker": [runtime._requests, runner.requests, runner.input_batch.req_id_to_index],
        "sums": [] if signals.attention_mass is None else [s._blocks for s in signals.attention_mass.sums.values()],
        "segments": [] if signals.segments is None else [c.counts for c in vars(signals.segments.table).values()],
        "client": [llm.llm_engine.output_processor.request_states],
    }
    for where, every in left.items():
        assert not any(every), f"{where} remembers {every}"
    store = scheduler.eviction.store
    assert store is None or store.num_used == 0, f"the store remembers {store._texts}"
    assert ledger.num_promised == 0
    assert sorted(runtime._rows._free) == list(range(runtime.num_rows)), "a row was lost"


def main() -> None:
    """Run the soak on every kind of engine and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="in all, shared by the kinds of engine")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    families = {family: SPECIAL | model_of(family) for family in FAMILIES if FAMILIES[family].is_special}
    drafting = {f"drafts of {name}": SPECULATIVE | DRAFTERS[name]() for name in ("ngram", "eagle")}
    drafting["drafts of ngram"]["async_scheduling"] = False  # as vLLM demands
    engines = ENGINES | families | drafting
    share = -(-arguments.requests // len(engines))
    for kind, settings in engines.items():
        llm = harness.engine(**settings)
        report = Soak(llm, arguments.seed, repeats=24).run(share)
        print(kind, ", ".join(f"{name} {value}" for name, value in asdict(report).items()), flush=True)
    harness.shutdown()


if __name__ == "__main__":
    sys.exit(main())
