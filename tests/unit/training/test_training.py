"""Training of gates: losses against their formulas, and small models of several kinds."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.policies.gates import INPUT
from skipkv_vllm.training import attention, loop
from skipkv_vllm.training import losses as losses_module
from skipkv_vllm.training.command import initial_bias
from skipkv_vllm.training.losses import IGNORED, losses, over_capacity
from skipkv_vllm.training.student import Student
from skipkv_vllm.worker.signals.gates import TokenGates
from tests.reference import formulas
from tests.simulation import FakeBlock
from tests.unit.training.models import CAPACITY, KINDS, LENGTH, SHAPE, VOCABULARY, random_model, set_bias, text


def test_keys_fade_with_their_age():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, heads, 7, 5, generator=generator) for heads in (4, 2, 2))
    log_beta = -torch.rand(2, 7, 2, generator=generator)
    found, _ = attention.fading_attention(SimpleNamespace(log_beta=log_beta), query, key, value, None, 5**-0.5)
    for n in range(2):
        for head in range(4):
            for t in range(7):
                weights = []
                for i in range(t + 1):
                    beta = math.exp(float(log_beta[n, i, head // 2]))
                    weights.append(math.exp(float(query[n, head, t] @ key[n, head // 2, i]) / 5**0.5) * beta ** (t - i))
                wanted = sum(w * value[n, head // 2, i] for i, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(found[n, t, head], wanted)


def test_fading_is_exact_in_long_texts():
    """Check that the result stays exact if both features of a key are large and nearly cancel."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 1, 4096, 8, generator=generator) for _ in range(3))
    log_beta = -torch.rand(1, 4096, 1, generator=generator)
    found, _ = attention.fading_attention(SimpleNamespace(log_beta=log_beta), query, key, value, None, 8**-0.5)
    logits = (query[0, 0, -1].double() @ key[0, 0].double().T) / 8**0.5
    logits += torch.arange(4095, -1, -1) * log_beta[0, :, 0].double()
    wanted = logits.softmax(-1) @ value[0, 0].double()
    torch.testing.assert_close(found[0, -1, 0].double(), wanted, atol=1e-3, rtol=1e-3)


def test_the_capacity_loss_is_the_formula(monkeypatch):
    log_beta = -torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(3)) / 10
    excess = []
    for n in range(2):
        for head in range(3):
            for t in range(9):
                lasting = sum(math.exp(float(log_beta[n, i, head])) ** (t - i) for i in range(t + 1))
                excess.append(max(0.0, lasting - 4) / max(1, t - 4))
    active = [x for x in excess if x]
    for part in (losses_module.PART, 2 * 9**2):
        monkeypatch.setattr(losses_module, "PART", part)
        assert float(over_capacity(log_beta, 4)) == pytest.approx(sum(active) / len(active), rel=1e-5)
        assert float(over_capacity(log_beta, 9)) == 0


@pytest.mark.parametrize("part", [2**24, 7 * VOCABULARY])
def test_losses_and_gradients_are_those_of_all_logits_at_once(student, monkeypatch, part):
    monkeypatch.setattr(losses_module, "PART", part)
    ids, labels = text()
    labels[:, :5] = IGNORED
    set_bias(student, 1.0)
    found = losses(student, ids, labels, CAPACITY)
    found.total.backward()
    gradients = [weight.grad.clone() for weight in student.gates.parameters()]
    student.gates.zero_grad()

    with torch.no_grad():
        wanted = (
            student.head(student(ids, gated=False)[0].flatten(0, 1)).unflatten(0, ids.shape)[:, :-1].log_softmax(-1)
        )
    hidden, log_beta = student(ids, gated=True)
    own = student.head(hidden.flatten(0, 1)).unflatten(0, ids.shape)[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != IGNORED
    divergence = (wanted.exp() * (wanted - own)).sum(-1)[counted].mean()
    next_token = -own.gather(-1, ids[:, 1:, None])[..., 0][counted].mean()
    torch.testing.assert_close(found.divergence, divergence)
    torch.testing.assert_close(found.next_token, next_token)
    (divergence + next_token + over_capacity(log_beta, CAPACITY)).backward()
    for weight, gradient in zip(student.gates.parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gates_a_model_is_as_it_was(kind):
    ids, _ = text()
    wanted = random_model(kind, "eager")(input_ids=ids).logits
    student = Student(random_model(kind), width=8, bias=60.0)
    for gated in (False, True):
        hidden, log_beta = student(ids, gated=gated)
        torch.testing.assert_close(student.head(hidden[1]), wanted[1], atol=1e-5, rtol=1e-4)
        assert (log_beta is not None) == gated


def test_a_model_that_names_no_kv_heads_has_one_per_query_head():
    shape = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    config = transformers.GPTNeoXConfig(vocab_size=VOCABULARY, **shape)
    config._attn_implementation = attention.NAME
    student = Student(transformers.GPTNeoXForCausalLM(config), width=8, bias=5.0)
    assert student.trained().num_kv_heads == 4
    assert all(value.isfinite() for value in losses(student, *text(), CAPACITY))


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_says_of_a_file_what_was_trained(kind, tmp_path):
    """`trimkv` loads the trained file, and its hooks compute the same numbers."""
    ids, labels = text()
    student = Student(random_model(kind), width=8, bias=3.0)
    loop.train(student, itertools.repeat((ids, labels)), steps=3, lr=1e-2, capacity=CAPACITY)
    student.trained().save(tmp_path / "gates.safetensors", {})
    config = KVPolicyConfig.parse(
        {"kv_policy": "trimkv", "kv_policy_config": {"gates": str(tmp_path / "gates.safetensors")}}
    )
    assert config.gates is not None
    config.gates.check_fits(hidden_size=16, num_layers=2, num_kv_heads=2)

    engine = TokenGates(
        config.gates.layers,
        first_head=0,
        num_heads=2,
        activation="silu",
        max_tokens=LENGTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    blocks, entering = [FakeBlock(), FakeBlock()], []
    engine.attach(blocks)
    for layer in student.model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda block, args, kwargs: entering.append(kwargs[INPUT][0]), with_kwargs=True
        )
    with torch.no_grad():
        _, log_beta = student(ids[:1], gated=True)
    for i, hidden in enumerate(entering):
        blocks[i](None, hidden_states=hidden)
        torch.testing.assert_close(engine._outputs[i], log_beta[i, 0])
        wanted = formulas.log_beta(config.gates.layers[i], hidden[5])
        torch.testing.assert_close(log_beta[i, 0, 5], torch.tensor(wanted))
    assert len(entering) == 2


def test_gates_that_are_open_cost_only_the_capacity(student):
    ids, labels = text()
    set_bias(student, 60.0)
    found = losses(student, ids, labels, CAPACITY)
    assert found.divergence.item() == pytest.approx(0, abs=1e-5)
    wanted = sum((t + 1 - CAPACITY) / max(1, t - CAPACITY) for t in range(CAPACITY, LENGTH)) / (LENGTH - CAPACITY)
    assert found.capacity.item() == pytest.approx(wanted, rel=1e-3)
    set_bias(student, 0.5)
    assert losses(student, ids, labels, CAPACITY).divergence.item() > 1e-2


def test_training_keeps_within_the_capacity_and_the_model_as_it_is(student):
    ids, labels = text()
    before = losses(student, ids, labels, CAPACITY)
    model = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    done = loop.train(student, iter([(ids, labels)] * 60), steps=60, lr=3e-2, capacity=CAPACITY)
    after = losses(student, ids, labels, CAPACITY)
    assert done.steps == 60
    assert before.capacity.item() > 0.3
    assert after.capacity.item() < 0.25 * before.capacity.item()
    assert after.total.item() < before.total.item()
    assert all(torch.equal(model[name], tensor) for name, tensor in student.model.state_dict().items())
    # Short-lived tokens alone would satisfy the capacity; the other losses tell tokens apart.
    _, log_beta = student(ids, gated=True)
    assert log_beta.std() > 0.01
    set_bias(student, -4.0)
    assert losses(student, ids, labels, CAPACITY).divergence.item() > 1.2 * after.divergence.item()


def test_a_layer_holds_only_its_input_for_the_backward_pass():
    """With recomputed layers, saved memory does not grow with their inner width."""
    ids, _ = text()
    sizes = []
    for width in (16, 512):
        student, saved = Student(random_model(intermediate_size=width), width=8, bias=5.0), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            student(ids, gated=True)
        sizes.append(sum(saved))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Mistral", {"sliding_window": 8}, r"layer 0 of MistralForCausalLM has sliding_window=8"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            r"layer 1 of Qwen2ForCausalLM is 'sliding_attention'; gates can only be trained for models with",
        ),
        (
            "Llama",
            {"hidden_act": "quick_gelu"},
            r"'quick_gelu' is not supported \(supported: silu, gelu.*\); choose another --model$",
        ),
    ],
)
def test_models_that_the_engine_would_refuse(kind, changes, message):
    with pytest.raises(KVPolicyError, match=message):
        Student(random_model(kind, **changes), width=8, bias=5.0)


def test_every_text_comes_once_before_any_comes_again():
    texts = [[i] * 4 for i in range(5)]
    data = loop.batches(texts, 2, 7, torch.device("cpu"))
    drawn = [row[0] for _ in range(5) for row in next(data)[0].tolist()]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    again = loop.batches(texts, 2, 7, torch.device("cpu"))
    assert [row[0] for _ in range(5) for row in next(again)[0].tolist()] == drawn
    assert len(next(loop.batches(texts, 64, 0, torch.device("cpu")))[0]) == 5


def test_gates_are_open_at_first():
    for length in (16, 2048, 131072):
        beta = 1 / (1 + math.exp(-initial_bias(length)))
        assert beta**length == pytest.approx(0.9, rel=1e-3)
