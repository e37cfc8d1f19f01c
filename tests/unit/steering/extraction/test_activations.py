"""Extraction: class means against a plain computation, on random states and on the bundled model."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.tiny_reasoner.problems import make_problem
from skipkv_vllm import bundled_model
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.steering import SteeringVector
from skipkv_vllm.steering.extraction.activations import ClassSums, measure
from skipkv_vllm.steering.extraction.checkpoints import open_checkpoint
from skipkv_vllm.steering.extraction.reasoning_texts import ReasoningText
from skipkv_vllm.steering.extraction.thoughts import load_keywords

KEYWORDS = load_keywords("seal")


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(bundled_model())


@pytest.fixture(scope="module")
def traces(checkpoint):
    return ideal_traces(checkpoint, 4)


def ideal_traces(checkpoint, count: int) -> list[ReasoningText]:
    found = []
    for seed in range(count):
        problem = make_problem(10**9 + seed, rules=(2, 2), doubt=(0.8, 0.8))
        chat = [{"role": "user", "content": problem.question}]
        prompt = checkpoint.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        found.append(ReasoningText(prompt, problem.completion, True))
    return found


def plain_difference(checkpoint, traces: list[ReasoningText], layer: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Return the means of `hidden_states[layer]` at the last token before each thought, from the text alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=torch.float32).eval()
    states: dict[str, list[torch.Tensor]] = {"execution": [], "reflection": [], "transition": []}
    for trace in traces:
        encoded = checkpoint.tokenizer(trace.prompt + trace.response, return_offsets_mapping=True)
        with torch.no_grad():
            out = model(torch.tensor([encoded.input_ids]), output_hidden_states=True)
        ends = [end for _, end in encoded.offset_mapping]
        inside = trace.response[: trace.response.index("</think>")]
        for gap in re.finditer(r"\n\n", inside):
            rest = inside[gap.end() :].lower()
            label = "reflection" if rest.startswith("wait") or "hold on" in rest.partition("\n\n")[0] else "execution"
            at = ends.index(len(trace.prompt) + gap.end())
            states[label].append(out.hidden_states[layer][0, at].double())
    counts = {label: len(each) for label, each in states.items()}
    return torch.stack(states["execution"]).mean(0) - torch.stack(states["reflection"]).mean(0), counts


def test_sums_equal_means_over_a_list():
    generator = torch.Generator().manual_seed(0)
    sums = ClassSums.zeros((1, 5), 6)
    kept = []
    for number in range(9):
        states = torch.randn(2, 7, 6, generator=generator)
        classes = torch.randint(0, 3, (7,), generator=generator)
        sums.add(number % 2, states, classes)
        kept.append((states.double(), classes))
    states = torch.cat([s for s, _ in kept], dim=1)
    classes = torch.cat([c for _, c in kept])
    for i, layer in enumerate((1, 5)):
        expected = states[i, classes == 0].mean(0) - states[i, classes != 0].mean(0)
        torch.testing.assert_close(sums.difference(layer), expected, rtol=0, atol=1e-12)
        assert sums.mean_norm(layer) == pytest.approx(float(states[i].norm(dim=-1).mean()))
        halves = []
        for half in (0, 1):
            s, c = torch.cat([s for s, _ in kept[half::2]], 1)[i], torch.cat([c for _, c in kept[half::2]])
            halves.append(s[c == 0].mean(0) - s[c != 0].mean(0))
        cosine = torch.nn.functional.cosine_similarity(*halves, dim=0)
        assert sums.split_half_cosine(layer) == pytest.approx(float(cosine))
    assert sums.counts.sum() == 63


def test_many_small_states_are_summed_in_float64():
    sums = ClassSums.zeros((0,), 1)
    for _ in range(3):
        # In float32 the thousands would hide the last digits.
        sums.add(0, torch.full((1, 1000, 1), 10000.001), torch.zeros(1000, dtype=torch.int64))
    sums.add(0, torch.full((1, 1, 1), 10000.0), torch.ones(1, dtype=torch.int64))
    exact = float(torch.tensor(10000.001)) - 10000.0
    assert float(sums.difference(0)) == pytest.approx(exact, rel=1e-6)


def test_one_half_without_a_class_has_no_cosine():
    sums = ClassSums.zeros((0,), 2)
    sums.add(0, torch.randn(1, 2, 2), torch.tensor([0, 1]))
    assert sums.split_half_cosine(0) is None


@pytest.mark.parametrize("layer", [1, 3])
def test_the_bundled_model_against_a_plain_computation(checkpoint, traces, layer, tmp_path):
    sums = measure(checkpoint, traces, (1, 3), KEYWORDS)
    expected, counts = plain_difference(checkpoint, traces, layer)
    torch.testing.assert_close(sums.difference(layer), expected, rtol=1e-4, atol=1e-4)
    vector = sums.vector(layer, checkpoint, KEYWORDS)
    assert {name: getattr(vector, name) for name in counts} == counts
    vector.save(tmp_path / "v.safetensors")
    back = SteeringVector.load(tmp_path / "v.safetensors")
    back.check_fits(checkpoint.hidden_size, checkpoint.num_layers, checkpoint.tokenizer_sha)
    assert (back.layer, back.keyword_set, back.base_model) == (layer, "seal", bundled_model())
    assert back.norm == pytest.approx(float(expected.norm()), rel=1e-4)


def test_too_few_thoughts_are_refused(checkpoint, traces):
    sums = measure(checkpoint, traces[:1], (1,), KEYWORDS)
    sums.check(1)
    with pytest.raises(KVPolicyError, match=r"needs at least 50 \(--min-thoughts\)"):
        sums.check(50)


def test_a_layer_that_does_not_exist_is_refused(checkpoint, traces):
    with pytest.raises(KVPolicyError, match=r"layer=4 is out of range: .* has 4 layers; allowed: 0 to 3"):
        measure(checkpoint, traces, (4,), KEYWORDS)


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(KVPolicyError, match="cannot be opened"):
        open_checkpoint(str(tmp_path / "nothing"))
