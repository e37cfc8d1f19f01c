"""LoRA adapters: requests of several adapters are compacted together, each as if its model were the only one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.lora.request import LoRARequest

from tests import harness
from tests.harness import MODEL, PAGE, Job
from tests.reference.comparison import another_question, check
from tests.reference.model import Model
from tests.reference.references import ReferenceCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.reference.settings import EngineTrace, Result, Settings

RANK, SCALE = 4, 2.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class ByPrompt:
    """Results of several models; each prompt has its own."""

    def __init__(self, caches: dict[tuple[int, ...], ReferenceCache]) -> None:
        self._caches = caches

    def get(self, prompt: Sequence[int], num_new: int, settings: Settings, trace: EngineTrace) -> Result:
        """See `ReferenceCache.get`."""
        return self._caches[tuple(prompt)].get(prompt, num_new, settings, trace)


def make_adapter(folder: Path, seed: int) -> Model:
    """Write a random adapter as PEFT does. Return the model with the adapter merged."""
    model = Model(MODEL)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(model.lm.model.layers):
        for name in TARGETS:
            weight = getattr(layer.self_attn, name).weight
            down = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = 0.05 * torch.randn(weight.shape[0], RANK, generator=generator)
            weight.data += SCALE * up @ down
            prefix = f"base_model.model.model.layers.{i}.self_attn.{name}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"}))
    return model


def test_requests_with_adapters(references: ReferenceCache, tmp_path: Path) -> None:
    merged = [make_adapter(tmp_path / str(seed), seed) for seed in range(2)]
    adapters = [LoRARequest(str(seed), seed + 1, str(tmp_path / str(seed))) for seed in range(2)]
    first, second = harness.demo_prompts(2, at_least=150)
    prompts, chosen = [first, second, another_question(first), another_question(second)], [0, 1, 1, 1]
    job = Job(
        prompts,
        ["skipkv", "skipkv", "rkv", "rkv"],
        160,
        every=5,
        arguments={
            "kv_granularity": "head",
            "kv_budget": 208,
            "kv_buffer": 32,
            "enable_lora": True,
            "max_loras": 2,
            "max_lora_rank": 8,
        },
        adapters={number: adapters[i] for number, i in enumerate(chosen)},
    )

    outcome = harness.run(job)

    own = [ReferenceCache(model) for model in merged]
    by_prompt = {tuple(prompt): own[i] for prompt, i in zip(prompts, chosen, strict=True)}
    results = check(job, outcome, ByPrompt(by_prompt), min_compactions=2)
    # The third prompt begins like the first, whose pages hold another adapter's keys; the last like the second.
    assert outcome.num_cached[:3] == [0, 0, 0]
    assert outcome.num_cached[3] >= 4 * PAGE
    for prompt, other, result in ((first, merged[1], results[0]), (second, references.model, results[1])):
        text = other.lm.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=-1)
        assert text[0, len(prompt) :].tolist() != result.tokens[:60], "the adapter changes nothing"

    # Alone: on CPUs, vLLM 0.32 computes requests without an adapter wrongly beside others with one.
    alone = dataclasses.replace(job, prompts=[first], policies=["skipkv"], adapters={})
    check(alone, harness.run(alone), references, min_compactions=2)
