"""Steering in the worker: coefficients in batches of any kind, and the hook."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import PPMissingLayer

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import KEYWORD_SHIFT, STATE
from skipkv_vllm.sentences import build_tables
from skipkv_vllm.steering import SteeringVector
from skipkv_vllm.steering.controller import SteeringController
from skipkv_vllm.worker.batch import StepBatch
from skipkv_vllm.worker.requests import Rows
from skipkv_vllm.worker.steering import Steering, decoder_layers
from tests.unit.steering.thinking import STRENGTH, WIDTH, ids, naive_alphas, random_text, tables, tokenizer


def make_steering(num_rows: int = 3, interval: int = 16, layers: tuple[int, ...] = (1, 0), **options: Any) -> Steering:
    vectors = [
        SteeringVector(
            values=torch.arange(1, WIDTH + 1).float() * (i + 1), layer=layer, num_layers=3, base_model="m", method="m"
        )
        for i, layer in enumerate(layers)
    ]
    sizes = {"interval": interval, "num_rows": num_rows, "max_tokens": 600}
    return Steering(tables(), vectors, **sizes, device=torch.device("cpu"), **options)


class Feed:
    """Runs texts through a `Steering` in steps and records its coefficient for every position."""

    def __init__(self, steering: Steering, counts_prompt: bool = False, interval: int = 16) -> None:
        self.steering = steering
        self.controller = SteeringController(tables(), interval, counts_prompt)
        self.texts: dict[str, list[int]] = {}
        self.read: dict[str, int] = {}
        self.alphas: dict[str, list[float]] = {}
        self.starts: dict[str, Any] = {}

    def start(self, name: str, text: list[int], num_prompt: int, vector: int = 1) -> None:
        self.texts[name], self.read[name], self.alphas[name] = text, 0, [0.0] * len(text)
        if vector:
            self.starts[name] = self.controller.start(name, text[:num_prompt], vector, STRENGTH)
            self.steering.start(self.starts[name])

    def end(self, name: str) -> None:
        self.steering.forget(name)

    def step(self, counts: dict[str, int]) -> None:
        """Run one step of these requests, in this order."""
        starts = [self.read[name] for name in counts]
        tokens = [t for name, n in counts.items() for t in self.texts[name][self.read[name] : self.read[name] + n]]
        batch = StepBatch(list(counts), np.array(list(counts.values())), np.array(starts), sum(counts.values()))
        # Padding belongs to no request.
        self.steering.prepare(batch, torch.tensor([*tokens, 0, 0], dtype=torch.int32))
        row, coefficient = self.steering.row.tolist(), self.steering.coefficient.tolist()
        at = 0
        for name, n in counts.items():
            for i in range(n):
                if row[at]:
                    assert row[at] == dict(zip(STATE, self.starts[name].state, strict=True))["vector"]
                    self.alphas[name][self.read[name] + i] = coefficient[at]
                at += 1
            self.read[name] += n
        assert not any(row[at:]), "a padding token is steered"
        assert self.steering.is_active or not any(row)


@pytest.mark.parametrize("seed", range(12))
def test_coefficients_do_not_depend_on_how_the_text_is_fed(seed):
    draw = random.Random(seed)
    feed = Feed(make_steering(num_rows=4))
    prompt = ids("Read a.\n\n<think>")
    texts = {name: prompt + random_text(seed * 10 + i, 200) for i, name in enumerate("abcd")}
    for i, (name, text) in enumerate(texts.items()):
        feed.start(name, text, len(prompt) if name != "b" else len(prompt) + 60, vector=i % 3)
    while any(feed.read[name] < 200 for name in texts):
        names = [name for name in texts if feed.read[name] < 200]
        draw.shuffle(names)
        chosen = names[: draw.randint(1, len(names))]
        largest = draw.choice((1, 1, 1, 30))
        for _ in range(draw.randint(1, 5)):
            chosen = [name for name in chosen if feed.read[name] < 200]
            if chosen:
                counts = {name: draw.randint(1, min(largest, 200 - feed.read[name])) for name in chosen}
                feed.step(counts)
    num_steered = 0
    for i, (name, text) in enumerate(texts.items()):
        first = len(prompt) if name != "b" else len(prompt) + 60
        thinks = ends_thinking(text[:first])
        wanted = naive_alphas(text, first, thinks, 16, STRENGTH)[:200] if i % 3 else [0.0] * 200
        assert feed.alphas[name][:200] == pytest.approx(wanted, abs=1e-6), name
        num_steered += sum(alpha != 0 for alpha in wanted)
    assert num_steered >= 5


def test_the_state_follows_accepted_tokens_only():
    """Each step reads some wrong drafts behind the right tokens, and takes them back."""
    prompt, text = ids("Read a.\n\n<think>"), random_text(3, 200)
    draw, whole = random.Random(5), prompt + text
    steering, controller = make_steering(num_rows=2, has_drafts=True), SteeringController(tables(), 16, False)
    steering.start(controller.start("a", prompt, 1, STRENGTH))
    found, read = [0.0] * len(whole), len(prompt)
    while read < len(whole):
        count = min(draw.randint(1, 4), len(whole) - read)
        accepted = draw.randint(1, count)
        drafts = draw.choices(text, k=count - accepted)
        tokens = torch.tensor([*whole[read : read + accepted], *drafts], dtype=torch.int32)
        # The scheduler may count drafts that were rejected.
        start = np.array([read + draw.randint(0, 3)])
        positions = torch.arange(read, read + count)
        batch = StepBatch(["a"], np.array([count]), start, count, positions)
        steering.prepare(batch, tokens)
        for i in range(accepted):
            found[read + i] = float(steering.coefficient[i]) if steering.row[i] else 0.0
        steering.accept(batch, tokens, torch.tensor([count - accepted]))
        read += accepted
    wanted = naive_alphas(whole, len(prompt), True, 16, STRENGTH)[: len(whole)]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert sum(alpha != 0 for alpha in wanted) >= 3


def ends_thinking(prompt: list[int]) -> bool:
    markers = [t for t in prompt if t in (ids("<think>")[0], ids("</think>")[0])]
    return bool(markers) and markers[-1] == ids("<think>")[0]


def test_a_resumed_request_is_steered_again_as_it_was():
    prompt, text = ids("a<think>"), random_text(3, 150)
    feed = Feed(make_steering(num_rows=2))
    feed.start("a", prompt + text, len(prompt))
    feed.step({"a": len(prompt)})
    for _ in range(120):
        feed.step({"a": 1})
    before = feed.alphas["a"].copy()
    row = feed.steering._requests["a"][0]
    counted = dict(zip(STATE, feed.steering.state[row].tolist(), strict=True))
    thoughts = feed.controller.finish(feed.starts["a"], (prompt + text)[: len(prompt) + 120])
    assert (counted["steered"], counted["execution"]) == (thoughts.steered_tokens, thoughts.execution)
    assert (counted["reflection"], counted["transition"]) == (thoughts.reflection, thoughts.transition)
    # It is preempted, another request takes its row, and it resumes with all its text, in two chunks.
    feed.end("a")
    feed.start("b", prompt + text, len(prompt), vector=2)
    feed.step({"b": 40})
    feed.start("a", prompt + text, len(prompt))
    feed.step({"b": 1, "a": 70})
    feed.step({"a": 50 + len(prompt), "b": 1})
    assert feed.alphas["a"] == before
    assert max(before) > STRENGTH.alpha0


def test_nobody_steered_costs_nothing_and_leaves_nothing():
    feed = Feed(make_steering())
    feed.start("plain", ids("a<think>.\n\n.\n\n"), 2, vector=0)
    feed.step({"plain": 4})
    assert not feed.steering.is_active
    feed.start("a", ids("a<think>.\n\n.\n\n"), 2)
    feed.step({"plain": 1, "a": 4})
    assert feed.steering.is_active
    assert feed.steering.row.any()
    feed.end("a")
    feed.step({"plain": 1})
    assert not feed.steering.is_active
    assert not feed.steering.row.any()


def test_a_step_that_reads_only_prompts_steers_nothing():
    feed = Feed(make_steering())
    feed.start("a", ids("a<think>.\n\n.\n\n.\n\nso"), 5)
    feed.step({"a": 4})
    assert not feed.steering.is_active
    feed.step({"a": 1})
    assert not feed.steering.row.any()


def test_a_dummy_pass_steers_nothing_but_may_be_captured():
    feed = Feed(make_steering())
    feed.start("a", ids("a<think>.\n\n.\n\n"), 2)
    feed.step({"a": 4})
    feed.steering.prepare_dummy()
    assert feed.steering.is_active
    assert not feed.steering.row.any()


def test_rows_come_back():
    rows = Rows(2)
    for i in range(7):
        rows.release(f"r{i - 2}")
        assert rows.take(f"r{i}") == rows.take(f"r{i}")
        rows.check_integrity()
    for name in ("r5", "r6", "stranger"):
        rows.release(name)
    assert sorted(rows._free) == [0, 1]
    rows._free.pop()
    with pytest.raises(AssertionError, match="a row was lost"):
        rows.check_integrity()


class Layer(nn.Module):
    """Like vLLM's decoder layers."""

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return residual * 2, residual


class Model(nn.Module):
    """Three layers, and a list of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        residual = None
        for layer in self.layers:
            hidden, residual = layer(torch.zeros(len(hidden)), hidden, residual)
        return hidden, residual


def test_decoder_layers_are_found_by_what_they_are():
    model = nn.Sequential(Model())
    assert decoder_layers(model, 3) is model[0].layers


def test_a_stage_of_a_pipeline_steers_only_its_own_layers():
    model, steering = Model(), make_steering()
    model.layers[0] = PPMissingLayer()
    steering.attach(decoder_layers(model, 3))
    assert [bool(layer._forward_pre_hooks) for layer in model.layers] == [False, True, False]


@pytest.mark.parametrize(("model", "number", "found"), [(Model(), 4, 0), (nn.Linear(2, 2), 3, 0)])
def test_a_model_without_decoder_layers_is_refused(model, number, found):
    with pytest.raises(KVPolicyError, match=f"found {found} lists of {number} decoder layers.*--kv-steering-vectors"):
        decoder_layers(model, number)


def test_two_lists_of_decoder_layers_are_refused():
    with pytest.raises(KVPolicyError, match=r"found 2 lists of 3 decoder layers .*0\.layers, 1\.layers"):
        decoder_layers(nn.Sequential(Model(), Model()), 3)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_vector_enters_the_stream_before_its_layer_and_touches_nobody_else(compiled):
    model, steering = Model(), make_steering()
    plain = Model()
    steering.attach(model.layers)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    run = torch.compile(model, backend=count, fullgraph=True, dynamic=True) if compiled else model
    hidden = torch.randn(5, WIDTH)
    base = plain(hidden)
    # Vector 1 belongs to layer 1, which sees `hidden * 2 + hidden`, vector 2 to layer 0.
    steering.row[:5] = torch.tensor([0, 1, 2, 0, 1])
    steering.coefficient[:5] = torch.tensor([7.0, 0.5, -1.0, 3.0, 2.0])
    added = steering.coefficient[:5, None] * torch.arange(1, WIDTH + 1)
    for active in (True, False, True):
        steering.is_active = active
        if compiled and not active:
            steering.row.zero_()
        out, residual = run(hidden)
        unsteered = [0, 3] if active else [0, 1, 2, 3, 4]
        assert torch.equal(out[unsteered], base[0][unsteered])
        assert torch.equal(residual[unsteered], base[1][unsteered])
        if active and steering.row.any():
            torch.testing.assert_close(residual[[1, 4]], base[1][[1, 4]] + 3 * added[[1, 4]])
            torch.testing.assert_close(residual[2], base[1][2] + 9 * 2 * added[2])
    if compiled:
        assert graphs == 1, "steps with and without steering must share compiled code"


def test_only_layers_of_a_vector_have_a_hook():
    model = Model()
    make_steering(layers=(1, 1)).attach(model.layers)
    assert [len(layer._forward_pre_hooks) for layer in model.layers] == [0, 1, 0]
    assert model.layers[1].skipkv_vectors.shape == (3, WIDTH)
    assert not model.layers[1].skipkv_vectors[0].any()
    assert "layers.1.skipkv_row" not in model.state_dict()


def test_the_class_of_a_token_is_beside_its_flags():
    (wait,) = (word for word in build_tables(tokenizer()).keywords if tokenizer().decode(list(word)) == " again")
    assert all(int(tables().vocabulary[token]) >> KEYWORD_SHIFT for token in wait)
