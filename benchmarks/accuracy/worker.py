"""One engine in a process of its own: takes requests from a connection and sends back finished answers."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipkv_vllm.evaluation.children import Finished, attended
from skipkv_vllm.evaluation.figures import FULL

from .grid import Arm, Settings, Steer

if TYPE_CHECKING:
    import vllm
    from vllm import RequestOutput


THOUGHTS = ("steered_tokens", "execution", "reflection", "transition")
"""What the engine counts in a steered answer, as `samples.Sample` names it."""


@dataclass(frozen=True)
class Request:
    """One sample to generate: its arm, the task's id and chat, and the sample's number and seed."""

    arm: Arm
    problem: str
    messages: list[dict[str, str]]
    number: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """One generated sample; see `samples.Sample` for the fields. `thoughts` are its counts of a steered answer."""

    request: Request
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    compactions: int
    evicted_tokens: int
    tokens_digest: str
    text: str
    thoughts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """The engine is ready; `kv_bytes_per_token` is of all layers and kv heads together."""

    kv_bytes_per_token: int


def work(connection: Connection, settings: Settings, batch_size: int, cores: Sequence[int], log: Path) -> None:
    """Body of a worker process: answers lists of `Request` until it gets None.

    Args:
        connection: receives `list[Request]` or None; sends `Started`, then per list its `Answer`s and `Finished`.
        settings: of the run.
        batch_size: `max_num_seqs` of the engine.
        cores: the cores this process may use; empty for all.
        log: where everything that the engine prints goes.
    """
    with attended(connection, log):
        _set_environment(cores)
        llm = start_engine(settings, batch_size)
        # What the start left behind stays; looking through it again and again costs a twentieth of the time.
        gc.collect()
        gc.freeze()
        connection.send(Started(_kv_bytes_per_token(llm)))
        while (requests := connection.recv()) is not None:
            _answer(llm, requests, settings, batch_size, connection)
            connection.send(Finished())
        llm.llm_engine.engine_core.shutdown()


def _set_environment(cores: Sequence[int]) -> None:
    """Set the environment; must run before torch and vLLM are imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if cores:
        os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = str(len(cores))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))


def engine_arguments(settings: Settings, batch_size: int) -> dict[str, Any]:
    """Arguments of `skipkv_vllm.LLM`: one engine that serves every policy of the grid."""
    # Neither statistics nor shared prompts are needed, and both cost time.
    arguments: dict[str, Any] = {"disable_log_stats": True, "enable_prefix_caching": False, "max_num_seqs": batch_size}
    if settings.evicting:
        own, *others = settings.evicting
        arguments |= {
            "kv_policy": own,
            "kv_policy_config": settings.policy_config,
            "kv_request_policies": others,
            "kv_buffer": settings.buffer,
            "kv_window": settings.window,
            "kv_granularity": settings.granularity,
            "kv_protect_prompt": settings.protect_prompt,
        }
    if settings.vectors:
        arguments["kv_steering_vectors"] = settings.vectors
    return arguments | settings.engine


def start_engine(settings: Settings, batch_size: int) -> vllm.LLM:
    """Start the engine of a batch size in this process."""
    from skipkv_vllm import LLM

    return LLM(settings.model, **engine_arguments(settings, batch_size))


def _kv_bytes_per_token(llm: vllm.LLM) -> int:
    config = llm.llm_engine.vllm_config
    model = config.model_config
    per_head = 2 * model.get_head_size() * model.dtype.itemsize
    return int(model.get_total_num_hidden_layers() * model.get_total_num_kv_heads() * per_head)


def _answer(
    llm: vllm.LLM, requests: list[Request], settings: Settings, batch_size: int, connection: Connection
) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    waiting = list(reversed(requests))
    running: dict[str, Request] = {}
    while waiting or running:
        # As many wait as run: enough that no seat stays empty, few enough to stay cheap.
        while waiting and len(running) < 2 * batch_size:
            request = waiting.pop()
            prompt = tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
            params = SamplingParams(
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=request.seed if settings.temperature else None,
                # Text is made of all tokens at once at the end, which is much cheaper.
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=request_options(request.arm, settings) or None,
            )
            arm = request.arm
            name = f"{arm.policy}-{arm.budget}-{arm.steering}-{request.problem}-{request.number}"
            running[name] = request
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        for output in engine.step():
            if output.finished:
                connection.send(_read(output, running.pop(output.request_id), tokenizer))


def request_options(arm: Arm, settings: Settings) -> dict[str, Any]:
    """The options that a request of an arm sends."""
    options: dict[str, Any] = {"kv_policy": arm.policy} if settings.evicting else {}
    if arm.policy != FULL:
        options["kv_budget"] = arm.budget
    if arm.steering:
        steer = Steer.parse(arm.steering)
        options |= {"steering": steer.vector, "steering_alpha0": steer.alpha0, "steering_gamma": steer.gamma}
    return options


def _read(output: RequestOutput, request: Request, tokenizer: Any) -> Answer:
    (completion,) = output.outputs
    token_ids = list(completion.token_ids)
    evictions = (output.kv_transfer_params or {}).get("skipkv", {})
    if evictions and evictions["policy"] != request.arm.policy:
        raise RuntimeError(
            f"asked for {request.arm.policy}, but {evictions['policy']} was applied to {request.problem}"
        )
    steered = evictions.get("steering", {})
    applied = str(Steer(steered["vector"], steered["alpha0"], steered["gamma"])) if steered else ""
    if applied != request.arm.steering:
        raise RuntimeError(f"asked for steering {request.arm.steering!r}, but {applied!r} was applied")
    return Answer(
        request,
        prompt_tokens=len(output.prompt_token_ids or ()),
        completion_tokens=len(token_ids),
        finish_reason=str(completion.finish_reason),
        compactions=evictions.get("compactions", 0),
        evicted_tokens=evictions.get("evicted_tokens", 0),
        tokens_digest=hashlib.sha256(repr(token_ids).encode()).hexdigest()[:16],
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        thoughts={key: steered[key] for key in THOUGHTS if steered},
    )
