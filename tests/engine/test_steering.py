"""A steered engine equals a Hugging Face model steered by the same rule; an unsteered one is vLLM to the last bit."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from skipkv_vllm.steering import SteeringVector
from tests import harness
from tests.harness import PAGE, Job, Outcome
from tests.reference.request import generate
from tests.reference.settings import Result, Settings, Steering

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

LAYERS = {"a": 2, "b": 1}
# The residual stream has a norm of about 80 there.
NORMS = {"a": 80.0, "b": 90.0}
STRENGTH = {"alpha0": 1.0, "gamma": 0.1, "alpha_max": 1.4, "interval": 16}
NO_EVICTION = {"kv_policy": "full", "kv_policy_config": {}, "kv_request_policies": []}
NEVER = 10_000
LONG = 150
TOLERANCE = 2e-3
"""of log probabilities"""

# Method and options of each request. Together they are a batch of steered and unsteered, evicted and full ones.
MIXED: list[tuple[str, dict[str, Any]]] = [
    ("skipkv", {}),
    ("full", {"steering": "b", "steering_alpha0": 0.7}),
    ("full", {"steering": "off"}),
    ("full", {}),
    ("skipkv", {"steering": "a", "steering_gamma": 0.0}),
    ("skipkv", {"steering": "off"}),
    ("rkv", {"steering": "b", "steering_alpha0": 1.3}),
    ("full", {"steering": "a", "steering_alpha0": 0.0, "steering_gamma": 0.0}),
]


@functools.cache
def vector(name: str) -> SteeringVector:
    """A random direction: what is tested is where and when it is added, not what it does."""
    values = torch.randn(128, generator=torch.Generator().manual_seed(LAYERS[name] + 5))
    return SteeringVector(
        values=values / values.norm() * NORMS[name],
        layer=LAYERS[name],
        num_layers=4,
        base_model="tiny-reasoner",
        method="random",
    )


@functools.cache
def files() -> dict[str, str]:
    """Saved vectors by name."""
    folder = tempfile.mkdtemp(prefix="skipkv-vectors-")
    for name in LAYERS:
        vector(name).save(Path(folder, f"{name}.safetensors"))
    return {name: str(Path(folder, f"{name}.safetensors")) for name in LAYERS}


def arguments(**others: Any) -> dict[str, Any]:
    """Engine arguments: both vectors, and "a" for whoever names none."""
    strength = {f"kv_steering_{name}": value for name, value in STRENGTH.items()}
    return {"kv_steering_vectors": files(), "kv_steering_default": "a"} | strength | others


def settings(method: str, options: dict[str, Any], compat: str = "default") -> Settings:
    """What the reference shall do for a request."""
    name = options.get("steering", "a")
    given = {key.removeprefix("steering_"): value for key, value in options.items() if key != "steering"}
    steering = None
    if name != "off":
        steering = Steering(LAYERS[name], vector(name).values, **STRENGTH | given, compat=compat)
    budget = NEVER if method == "full" else harness.POLICY_ARGUMENTS["kv_budget"]
    buffer = harness.POLICY_ARGUMENTS["kv_buffer"]
    return Settings("rkv" if method == "full" else method, "head", budget, buffer, steering=steering)


def check(job: Job, outcome: Outcome, references: ReferenceCache, compat: str = "default") -> list[Result]:
    """Compare all requests of a job with the reference, and what their traces count."""
    results = []
    for number, (prompt, method, options) in enumerate(zip(job.prompts, job.policies, job.options, strict=True)):
        wanted, trace = settings(method, options, compat), outcome.traces[number]
        result = references.get(prompt, job.num_new, wanted, trace)
        results.append(result)
        name = f"request {number} ({method}, {options})"
        assert outcome.tokens[number] == result.tokens, name
        if job.num_logprobs is not None:
            found = [by_token[token] for by_token, token in zip(outcome.logprobs[number], result.tokens, strict=True)]
            torch.testing.assert_close(
                torch.tensor(found), torch.tensor(result.logprobs), rtol=0, atol=TOLERANCE, msg=name
            )
        counted = trace.parameters["request_steering"]
        if wanted.steering is None:
            assert counted is None, name
        else:
            assert counted["steered_tokens"] == sum(alpha != 0 for alpha in result.alphas), name
            assert counted["vector"] == options.get("steering", "a")
            assert counted["reflection"] > 0, "without doubts the strength never grows"
            assert counted["execution"] > 0
    return results


def mixed_job(num_new: int, pairs: list[tuple[str, dict[str, Any]]] = MIXED, **others: Any) -> Job:
    """A job of a request for each pair; every other prompt takes two chunks."""
    prompts = [
        p for two in zip(harness.demo_prompts(4, at_least=LONG), harness.demo_prompts(4), strict=True) for p in two
    ]
    policies, options = [method for method, _ in pairs], [given for _, given in pairs]
    return Job(
        prompts[: len(pairs)],
        policies,
        num_new,
        every=5,
        arguments=arguments(**others),
        num_logprobs=0,
        options=options,
    )


@pytest.mark.parametrize(("runner", "eager"), harness.RUNNERS.values(), ids=list(harness.RUNNERS))
def test_engine_equals_reference(runner: str, eager: bool, references: ReferenceCache) -> None:
    job = mixed_job(300 if runner == "v1" else 200, enforce_eager=eager)

    outcome = harness.run(job, runner)

    assert outcome.is_v2 == (runner == "v2")
    results = check(job, outcome, references)
    assert any(len(r.events) > 1 for r in results), "nothing was evicted"
    for (method, options), result, prompt in zip(MIXED, results, job.prompts, strict=True):
        alphas = sorted({alpha for alpha in result.alphas if alpha})
        if options.get("steering") == "off" or options.get("steering_alpha0") == 0:
            assert not alphas
            continue
        assert len(alphas) == 1 if options.get("steering_gamma") == 0 else len(alphas) > 1
        plain = generate(references.model, prompt, job.num_new, settings(method, {"steering": "off"}))
        change = torch.tensor(plain.logprobs) - torch.tensor(result.logprobs)
        assert plain.tokens != result.tokens or change.abs().max() > 10 * TOLERANCE, "so the test has no power"
    assert max(max(r.alphas, default=0) for r in results) == pytest.approx(STRENGTH["alpha_max"])


def test_preempted_requests_are_steered_again_as_they_were(references: ReferenceCache) -> None:
    pairs = [("full", {}), ("full", {"steering": "b"}), ("full", {"steering": "off"}), ("full", {})]
    # Three requests of 400 tokens fill the pool.
    job = mixed_job(280, pairs, num_gpu_blocks_override=36, max_model_len=1024, kv_admission="optimistic")

    outcome = harness.run(job)

    lengths = [[s.num_logical for s in outcome.samples if s.request == number] for number in range(len(pairs))]
    lives = [sum(b < a for a, b in itertools.pairwise(one)) for one in lengths]
    assert any(lives[i] and pairs[i][1].get("steering") != "off" for i in range(len(pairs))), "nobody was preempted"
    check(job, outcome, references)


def test_published_compat_counts_the_prompt_and_steers_its_last_token(references: ReferenceCache) -> None:
    thought = "Read a = 1 + 2, so a: 3.\n\nWait, start over.\n\nRead a = 1 + 2, so a: 3.\n\nAlternatively go on.\n\n"
    thought = harness.tokenizer().encode(thought, add_special_tokens=False)
    (first, *_), (second, *_) = harness.demo_prompts(1), harness.demo_prompts(1, at_least=LONG)
    pairs = [("full", {}), ("skipkv", {"steering": "b"}), ("full", {"steering": "off"}), ("skipkv", {})]
    # The last two come when the prefix cache holds what they begin with.
    prompts = [first + thought, second + thought, first + thought, second + thought]
    options = [given for _, given in pairs]
    job = Job(
        prompts,
        [method for method, _ in pairs],
        200,
        every=20,
        arguments=arguments(kv_steering_compat="published"),
        num_logprobs=0,
        options=options,
    )

    outcome = harness.run(job)

    results = check(job, outcome, references, "published")
    assert results[0].alphas[len(prompts[0]) - 1] == STRENGTH["alpha0"], "the last prompt token was not steered"
    assert not any(results[0].alphas[: len(prompts[0]) - 1])
    doubts = [alpha for alpha in results[0].alphas[len(prompts[0]) :] if alpha]
    assert max(doubts[:4]) > STRENGTH["alpha0"], "the doubts of the prompt were not counted"
    assert outcome.num_cached[3] >= PAGE


def test_steered_pages_are_not_shared(references: ReferenceCache) -> None:
    """A follow-up finds the prompt's pages in the prefix cache, and none of what was written while steered."""
    (prompt,) = harness.demo_prompts(1, at_least=LONG)
    num_new = 100
    text = references.get(prompt, num_new, settings("full", {}), NO_TRACE).tokens
    follow_up = prompt + text
    job = Job(
        [prompt, follow_up, follow_up, prompt],
        ["full"] * 4,
        num_new,
        every=num_new + 20,
        arguments=arguments(),
        num_logprobs=0,
        options=[{}, {"steering": "off"}, {}, {}],
    )

    outcome = harness.run(job)

    assert outcome.num_cached[1] == len(prompt) // PAGE * PAGE
    # Those of the unsteered follow-up may be shared, also with a steered one, whose prompt they are.
    assert outcome.num_cached[2] >= len(follow_up) // PAGE * PAGE
    assert outcome.num_cached[3] == len(prompt) // PAGE * PAGE
    check(job, outcome, references)


class NO_TRACE:  # noqa: N801
    """Of a request whose cache is never compacted."""

    logical_length = torch.zeros(0, dtype=torch.int64)
    kept: list[torch.Tensor] = []


@pytest.mark.parametrize(("runner", "num_new"), [("v1", 150), ("v2", 20)])
def test_without_strength_the_engine_is_vllm(runner: str, num_new: int) -> None:
    prompts = harness.demo_prompts(4)
    stock = harness.run(Job(prompts, [], num_new, every=5, num_logprobs=5), runner)
    nothing = {"kv_steering_alpha0": 0.0, "kv_steering_gamma": 0.0}
    job = Job(
        prompts,
        ["full"] * 4,
        num_new,
        every=5,
        arguments=NO_EVICTION | arguments(**nothing),
        num_logprobs=5,
        options=[{}, {"steering": "off"}, {"steering": "b"}, {"steering": "b", "steering_alpha0": 1.0}],
    )

    outcome = harness.run(job, runner)

    assert outcome.tokens[:3] == stock.tokens[:3]
    assert outcome.logprobs[:3] == stock.logprobs[:3]
    # One of its companions is steered all the same.
    assert outcome.logprobs[3] != stock.logprobs[3]
