"""Training of gates: losses as the formulas say, and a small model whose gates learn to stay within a capacity."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.tiny_reasoner.train_gates import (
    ATTENTION,
    Student,
    _fading_attention,
    losses,
    over_capacity,
    train,
)
from skipkv_vllm.gates import Gates
from tests import dense_policies

LENGTH, CAPACITY = 24, 6


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=20, num_key_value_heads=2, initializer_range=0.2, **shape)
    config._attn_implementation = ATTENTION
    return Student(Qwen2ForCausalLM(config), width=8, bias=5.0)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, ids.clone()


def test_keys_fade_with_their_age():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, heads, 7, 5, generator=generator) for heads in (4, 2, 2))
    log_beta = -torch.rand(2, 7, 2, generator=generator)
    found, _ = _fading_attention(SimpleNamespace(log_beta=log_beta), query, key, value, None, 5**-0.5)
    for n in range(2):
        for head in range(4):
            for t in range(7):
                weights = []
                for i in range(t + 1):
                    beta = math.exp(float(log_beta[n, i, head // 2]))
                    weights.append(math.exp(float(query[n, head, t] @ key[n, head // 2, i]) / 5**0.5) * beta ** (t - i))
                wanted = sum(w * value[n, head // 2, i] for i, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(found[n, t, head], wanted)


def test_the_capacity_loss_is_the_formula():
    log_beta = -torch.rand(2, 9, 3, generator=torch.Generator().manual_seed(3)) / 10
    excess = []
    for n in range(2):
        for head in range(3):
            for t in range(9):
                lasting = sum(math.exp(float(log_beta[n, i, head])) ** (t - i) for i in range(t + 1))
                excess.append(max(0.0, lasting - 4) / max(1, t - 4))
    active = [x for x in excess if x]
    assert float(over_capacity(log_beta, 4)) == pytest.approx(sum(active) / len(active), rel=1e-5)
    assert float(over_capacity(log_beta, 9)) == 0


def test_gates_that_are_open_change_nothing_and_the_file_says_the_same(student, tmp_path):
    ids, labels = text()
    for gate in student.gates:
        torch.nn.init.constant_(gate.second.bias, 60.0)
    full, none = student(ids, gated=False)
    same, log_beta = student(ids, gated=True)
    assert none is None
    torch.testing.assert_close(full, same)
    assert losses(student, ids, labels, CAPACITY).divergence.item() == pytest.approx(0, abs=1e-5)
    assert losses(student, ids, labels, CAPACITY).capacity.item() == pytest.approx(
        sum((t + 1 - CAPACITY) / max(1, t - CAPACITY) for t in range(CAPACITY, LENGTH)) / (LENGTH - CAPACITY), rel=1e-3
    )

    for gate in student.gates:
        torch.nn.init.constant_(gate.second.bias, 0.5)
    faded, log_beta = student(ids, gated=True)
    assert (faded - full).abs().max() > 1e-2
    Gates([gate.gate() for gate in student.gates]).save(tmp_path / "gates.safetensors", {})
    hidden = student.model.model.layers[0].input_layernorm(student.model.model.embed_tokens(ids[0, 5]))
    wanted = dense_policies.log_beta(Gates.load(tmp_path / "gates.safetensors").layers[0], hidden)
    torch.testing.assert_close(log_beta[0, 0, 5], torch.tensor(wanted))


def test_training_keeps_within_the_capacity_and_the_model_as_it_is(student):
    ids, labels = text()
    before = losses(student, ids, labels, CAPACITY)
    model = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    train(student, iter([(ids, labels)] * 60), steps=60, lr=3e-2, capacity=CAPACITY)
    after = losses(student, ids, labels, CAPACITY)
    assert before.capacity.item() > 0.3
    assert after.capacity.item() < 0.25 * before.capacity.item()
    assert after.total.item() < before.total.item()
    assert all(torch.equal(model[name], tensor) for name, tensor in student.model.state_dict().items())
    # All tokens short-lived would do for the capacity; the other losses tell them apart.
    _, log_beta = student(ids, gated=True)
    assert log_beta.std() > 0.01
    closed = [torch.nn.init.constant_(gate.second.bias, -4.0) for gate in student.gates]
    assert len(closed) == 2
    assert losses(student, ids, labels, CAPACITY).divergence.item() > 1.2 * after.divergence.item()
