"""Learned gates in the engine: their outputs stay with the blocks, and `trimkv` keeps the tokens of its formula."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams

from benchmarks.tiny_reasoner.problems import extract_answer, problems
from skipkv_vllm import bundled_gates
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.training import attention
from skipkv_vllm.training.loop import train
from skipkv_vllm.training.student import Student
from tests import harness
from tests.harness import PAGE, Job
from tests.reference.comparison import UNPROTECTED, another_question, check

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

LONG = 150
GATES: dict[str, Any] = {"kv_policy": "trimkv", "kv_policy_config": {"gates": bundled_gates()}}
SIZES = {"tensor": {"tensor_parallel_size": 2}, "pipeline": {"pipeline_parallel_size": 2, "async_scheduling": False}}
PROBLEMS, BUDGET = 24, 198
"""A quarter of full KV: the smallest budget that the model's task fits into; see its README."""


@pytest.fixture(autouse=True)
def gated(references: ReferenceCache) -> None:
    if not references.model.gates:
        references.model.load_gates(bundled_gates())


@pytest.mark.parametrize(("runner", "eager"), harness.RUNNERS.values(), ids=list(harness.RUNNERS))
def test_engine_equals_reference(runner: str, eager: bool, references: ReferenceCache) -> None:
    """Prompts of one and of two chunks, requests of other methods, and a prompt that the prefix cache has."""
    long, *short = [*harness.demo_prompts(1, at_least=LONG), *harness.demo_prompts(4)]
    prompts = [long, *short[:3], another_question(long), short[3]]
    policies = ["trimkv", "trimkv", "h2o", "full", "trimkv", "rkv"]
    arguments = GATES | {"kv_budget": 160, "kv_buffer": 32, "enforce_eager": eager}
    job = Job(prompts, policies, 260 if runner == "v1" else 180, every=5, arguments=arguments)

    outcome = harness.run(job, runner)

    assert outcome.is_v2 == (runner == "v2")
    assert outcome.num_cached[4] >= 4 * PAGE
    check(job, outcome, references, min_compactions=2)


def test_sentences_leave_by_what_gates_said(references: ReferenceCache) -> None:
    prompts = harness.demo_prompts(2, at_least=LONG)
    job = Job(prompts, ["trimkv"] * 2, 250, every=3, arguments=GATES | {"kv_granularity": "sentence"})
    check(job, harness.run(job), references, min_compactions=2)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_shared_pages_carry_what_was_said(is_async: bool, references: ReferenceCache) -> None:
    """Prompts are evicted by gate outputs that were stored when a request of another method wrote their blocks."""
    (first,) = harness.demo_prompts(1, at_least=LONG)
    prompts = [first, another_question(first), another_question(first), first]
    arguments = GATES | UNPROTECTED | {"async_scheduling": is_async}
    job = Job(prompts, ["rkv", "trimkv", "trimkv", "trimkv"], 150, every=1, arguments=arguments, budgets=[160] * 4)

    outcome = harness.run(job)

    assert outcome.is_async == is_async
    assert min(outcome.num_cached[1:3]) >= 3 * PAGE
    check(job, outcome, references, min_compactions=3)


def test_preempted_requests_keep_the_same_again(references: ReferenceCache) -> None:
    (long,) = harness.demo_prompts(1, at_least=100)
    short = harness.demo_prompts(3)
    arguments = GATES | UNPROTECTED | {"kv_admission": "optimistic", "num_gpu_blocks_override": 12}
    arguments |= {"max_model_len": 256, "max_num_batched_tokens": 64}
    job = Job(
        [short[0], long, another_question(long), *short[1:]],
        ["full", "trimkv", "trimkv", "trimkv", "h2o"],
        100,
        every=3,
        arguments=arguments,
        budgets=[None, 160, None, None, None],
    )

    outcome = harness.run(job)

    preempted = {job.policies[i] for i, count in enumerate(outcome.num_preemptions) if count}
    assert "trimkv" in preempted, "no request that reads gates was preempted"
    assert outcome.num_cached[2] == 3 * PAGE
    check(job, outcome, references, min_compactions=1)


@pytest.mark.usefixtures("one_thread_a_worker")
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_every_rank_has_the_gates_of_its_layers_and_heads(size: dict[str, int], references: ReferenceCache) -> None:
    first, *others = harness.demo_prompts(3, at_least=LONG)
    arguments = GATES | size | {"max_model_len": 512, "max_num_batched_tokens": 512}
    policies = ["trimkv", "h2o", "trimkv", "trimkv"]
    job = Job([first, *others, another_question(first)], policies, 200, every=7, arguments=arguments)
    check(job, harness.run(job), references, min_compactions=2)


def test_gates_of_another_model_are_refused_at_the_start() -> None:
    with pytest.raises(KVPolicyError, match=r"gates '/nowhere\.safetensors': there is no such file"):
        harness.engine(**GATES | {"kv_policy_config": {"gates": "/nowhere.safetensors"}})


def test_trained_gates_say_the_same_in_the_engine(tmp_path: Path) -> None:
    """A small random Llama: the outputs of the trainer's networks and of the engine's hooks for a prompt."""
    student, ids = _trained(tmp_path), torch.tensor([harness.demo_prompts(1, at_least=100)[0][:100]])
    arguments = GATES | {"kv_policy_config": {"gates": str(tmp_path / "gates.safetensors")}, "kv_request_policies": []}
    llm = harness.engine(model=str(tmp_path / "model"), **arguments | {"max_model_len": 512})
    params = SamplingParams(max_tokens=1, temperature=0.0)
    llm.generate([{"prompt_token_ids": ids[0].tolist()}], params, use_tqdm=False)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    said: list[torch.Tensor] = []
    for gate, layer in zip(student.gates, student.model.model.layers, strict=True):
        layer.self_attn.register_forward_pre_hook(
            lambda block, args, kwargs, gate=gate: said.append(gate(kwargs["hidden_states"][0])), with_kwargs=True
        )
    with torch.no_grad():
        student(ids, gated=False)
    for number, wanted in enumerate(said):
        assert wanted.std() > 1e-3
        torch.testing.assert_close(
            runner.runtime.signals.gates._outputs[number][: ids.shape[1]], wanted, atol=1e-4, rtol=1e-4
        )


def _trained(folder: Path) -> Student:
    """Train gates for two steps for the random model in `model`, and write them to `gates.safetensors`."""
    tokenizer = harness.tokenizer()
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = LlamaForCausalLM.from_pretrained(folder / "model", attn_implementation=attention.NAME)
    student = Student(model, width=16, bias=3.0)
    ids = torch.randint(len(tokenizer), (2, 40))
    train(student, iter([(ids, ids)] * 2), steps=2, lr=1e-2, capacity=8)
    student.trained().save(folder / "gates.safetensors", {})
    return student


def test_learned_gates_choose_better_than_chance() -> None:
    """Solve dev problems at a budget where random eviction solves almost none and full KV all of them."""
    tasks = list(problems("dev", PROBLEMS))
    llm = harness.engine(**GATES | {"kv_budget": BUDGET, "kv_buffer": 128, "kv_check_integrity": False})
    rates = {}
    for policy in ("full", "random", "trimkv"):
        params = SamplingParams(max_tokens=900, temperature=0.0, extra_args={"kv_policy": policy})
        prompts = [{"prompt_token_ids": harness.chat_prompt(task.question)} for task in tasks]
        answers = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
        right = [extract_answer(text) == task.answer for text, task in zip(answers, tasks, strict=True)]
        rates[policy] = sum(right) / PROBLEMS
    print(f"{PROBLEMS} dev problems at a budget of {BUDGET}: " + ", ".join(f"{k} {v:.1%}" for k, v in rates.items()))
    assert rates["full"] >= 0.95
    assert rates["random"] <= 0.3
    assert rates["trimkv"] >= rates["random"] + 0.3
