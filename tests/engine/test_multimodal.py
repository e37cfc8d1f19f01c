"""A model that hears evicts as the oracle does, whose embeddings of audio tokens are those of a Hugging Face model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm import SamplingParams

from skipkv_vllm.trace.files import Trace, trace_path
from tests import harness
from tests.audio_model import MARKS, QUESTION, RATE, audio_model, heard, sound, text_model
from tests.reference.model import Model
from tests.reference.request import generate
from tests.reference.settings import Settings

SIZES: dict[str, Any] = {"kv_budget": 160, "kv_buffer": 48, "kv_request_policies": ["h2o", "rkv"]}
NUM_NEW = 310
NOTHING = torch.empty(0, 128)


def oracle(features: torch.Tensor) -> Model:
    """Return an oracle that hears a sound where its text has audio tokens."""
    model, position = Model(text_model()), 0

    def embed(_module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        nonlocal position
        is_audio = inputs[0] == model.tokenizer.convert_tokens_to_ids(MARKS[0])
        number = int(is_audio.sum())
        output[is_audio] = features[position : position + number]
        position = (position + number) % max(1, len(features))
        return output

    model.lm.model.embed_tokens.register_forward_hook(embed)
    return model


@pytest.mark.parametrize("granularity", ["head", "sentence"])
def test_requests_with_sounds_equal_the_reference(granularity: str) -> None:
    """Two sounds beside a text; the third request repeats the first one's sound, and finds it in the prefix cache."""
    sounds = [sound(2, 0.05), sound(4, 0.4), None, sound(2, 0.05)]
    methods = ["skipkv", "h2o", "skipkv", "rkv"]
    llm = harness.engine(model=audio_model(), kv_granularity=granularity, **SIZES)
    engine, names = llm.llm_engine, []
    for number, (samples, method) in enumerate(zip(sounds, methods, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True, extra_args={"kv_policy": method})
        prompt: Any = {"prompt_token_ids": harness.demo_prompts(1)[0]}
        if samples is not None:
            prompt = {"prompt": QUESTION, "multi_modal_data": {"audio": [(samples, RATE)]}}
        names.append(engine.add_request(str(number), prompt, params))
        engine.step()
        engine.step()
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {int(output.request_id): output for output in engine.step()}
    harness.assert_pool_empty(llm)
    assert harness.collector_of(llm).flush()
    for number, (samples, method) in enumerate(zip(sounds, methods, strict=True)):
        prompt_ids, features = (harness.demo_prompts(1)[0], NOTHING) if samples is None else heard(samples)
        assert outputs[number].prompt_token_ids == prompt_ids
        trace = Trace.load(trace_path(harness.trace_folder(), names[number]))
        result = generate(oracle(features), prompt_ids, NUM_NEW, Settings(method, granularity, 160, 48), trace)
        assert list(outputs[number].outputs[0].token_ids) == result.tokens, f"request {number}"
        assert len(result.events) >= 3
        assert len(trace.kept) == len(result.events)


def test_sounds_without_eviction_are_stock_vllm() -> None:
    prompt = {"prompt": QUESTION, "multi_modal_data": {"audio": [(sound(3, 0.2), RATE)]}}
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, logprobs=3)
    (expected,) = harness.stock_engine(model=audio_model()).generate(prompt, params, use_tqdm=False)
    sizes = SIZES | {"kv_budget": 1024}
    (found,) = harness.engine(model=audio_model(), **sizes).generate(prompt, params, use_tqdm=False)
    for name in ("token_ids", "logprobs"):
        assert getattr(found.outputs[0], name) == getattr(expected.outputs[0], name)
