"""Steering's tables, and the controller's counts in prompts and thoughts."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.ops import STATE, THOUGHT
from skipkv_vllm.sentences import SentenceTables, build_tables, split_sentences
from skipkv_vllm.steering.controller import SteeringController
from skipkv_vllm.steering.tables import _keyword_machine, build_thought_tables
from tests.unit.steering.thinking import STRENGTH, ids, naive_alphas, random_text, tables, tokenizer


def test_what_the_bundled_tokenizers_tokens_are():
    flags = tables().vocabulary

    def texts(flag: int) -> set[str]:
        return {tokenizer().decode([i]) for i in (flags & flag).nonzero().flatten().tolist()}

    assert texts(THOUGHT.SPLIT) == {"\n\n", ".\n\n", "?\n\n", ")\n\n", ">\n\n"}
    assert set((flags & THOUGHT.DELIMITER).nonzero().flatten().tolist()) == build_tables(tokenizer()).delimiters
    assert (texts(THOUGHT.BEGIN), texts(THOUGHT.END)) == ({"<think>"}, {"</think>"})
    assert tables("published").merge is False
    assert tables().merge is True


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"\n\n": 0, "a": 1}, "no token for <think> and </think>"),
        ({"\n\n": 0, "<think>": 1}, "no token for </think>"),
        ({"\n": 0, "<think>": 1, "</think>": 2}, "no token with a blank line"),
    ],
)
def test_a_tokenizer_that_cannot_tell_thoughts_is_refused(vocabulary, message):
    tokens = models.WordLevel({**vocabulary, "[UNK]": 9}, unk_token="[UNK]")
    with pytest.raises(KVPolicyError, match=f"{message}.*start without --kv-steering-vectors"):
        build_thought_tables(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokens)), 10)


@pytest.mark.parametrize("seed", range(40))
def test_the_machine_finds_the_keywords_that_segment_finds(seed):
    draw = random.Random(seed)
    words = tuple({tuple(draw.choices(range(4), k=draw.randint(1, 4))) for _ in range(5)})
    sentences = SentenceTables(frozenset({9}), words, True, "max", frozenset(words[:2]))
    tokens = sorted({t for word in words for t in word})
    machine = _keyword_machine(sentences, tokens)
    column = {token: i for i, token in enumerate(tokens, 1)}
    text = draw.choices(range(5), k=30)
    state = kinds = 0
    for token in text:
        step = int(machine[state, column.get(token, 0)])
        state, kinds = step >> 2, kinds | step & 3
    found = [word for word in words if any(tuple(text[i : i + len(word)]) == word for i in range(30))]
    wanted = {2 if word in sentences.transitions else 1 for word in found}
    assert kinds == sum(wanted)


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [("a<think>\n", 1), ("a<think>b</think>\n\n", 0), ("a", 0), ("</think>a<think>\n\n", 1)],
)
def test_the_last_marker_of_the_prompt_decides_whether_the_model_thinks(prompt, thinks):
    start = SteeringController(tables(), 16, counts_prompt=False).start("r", ids(prompt), 3, STRENGTH)
    state = dict(zip(STATE, start.state, strict=True))
    assert state == dict.fromkeys(STATE, 0) | {"vector": 3, "thinking": thinks}
    assert start.first == len(ids(prompt))


def test_published_rules_counts_the_prompt_up_to_its_last_token():
    prompt = ids("Wait, a.\n\n<think>Alternatively b.\n\nRead.\n\n")
    start = SteeringController(tables("published"), 16, counts_prompt=True).start("r", prompt, 1, STRENGTH)
    state = dict(zip(STATE, start.state, strict=True))
    assert start.first == len(prompt) - 1
    # The last token of "Wait" is in "Alternatively" too, so both are doubts in the published code.
    assert (state["reflection"], state["transition"], state["execution"]) == (2, 0, 0)
    assert (state["latched"], state["thinking"], state["steered"]) == (0, 1, 0)


@pytest.mark.parametrize("seed", range(10))
def test_thoughts_are_the_sentences_that_eviction_and_traces_see(seed):
    text = random_text(seed, 300)
    controller = SteeringController(tables(), 16, counts_prompt=False)
    start = controller.start("r", ids("a<think>"), 1, STRENGTH)
    prompt = ids("a<think>")
    thoughts = controller.finish(start, prompt + text)
    sentences = split_sentences(text, build_tables(tokenizer()))
    assert thoughts.execution == sum(s.is_execution for s in sentences)
    assert thoughts.reflection + thoughts.transition == sum(not s.is_execution for s in sentences)
    wanted = naive_alphas(prompt + text, len(prompt), True, 16, STRENGTH)
    assert thoughts.steered_tokens == sum(alpha != 0 for alpha in wanted) > 5


def test_kinds_of_thoughts():
    controller = SteeringController(tables(), 16, counts_prompt=False)
    start = controller.start("r", ids("a"), 1, STRENGTH)
    text = ids("aRead.\n\nWait, check again.\n\nAlternatively b.\n\nAlternatively, Wait.\n\nso")
    thoughts = controller.finish(start, text)
    assert thoughts == (0, 1, 2, 1), "without thinking nothing is steered, and doubt comes before change"
