"""`skipkv trace view`: the page shows exactly the content of the trace."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

from skipkv_vllm.cli import trace_view
from skipkv_vllm.core.errors import KVPolicyError
from tests.unit.cli.pages import BUDGET, HEADS, LAYERS, NASTY, encode, make_trace, tokenizer, view


def held_sets(life: dict, layers: int, heads: int) -> list[list[list[set[int]]]]:
    """Return the positions held after each compaction, by layer and head, from the page's numbers."""
    numbers = np.frombuffer(base64.b64decode(life["lost"]), {1: "u1", 4: "<i4"}[life["lost_bytes"]])
    lost = numbers.reshape(layers, heads, life["logical"][-1])
    later = np.frombuffer(base64.b64decode(life["later_rows"]), "<i4").reshape(-1, 2)
    found, has_returned = [], np.zeros(lost.size, dtype=bool)
    for number, logical in enumerate(life["logical"], 1):
        has_returned[later[later[:, 1] == number, 0]] ^= True
        held = has_returned.reshape(lost.shape) | ~((lost > 0) & (lost <= number))
        found.append([[set(np.flatnonzero(row[:logical]).tolist()) for row in rows] for rows in held])
    return found


@pytest.mark.parametrize("memory", [0.0, 0.5])
@pytest.mark.parametrize("lives", [((0, 1),), ((0, 5),), ((0, 3), (1, 2), (3, 4)), ((1, 260),)])
def test_the_survivors_can_be_read_from_the_page(tmp_path, lives, memory):
    trace = make_trace(lives, kv_recall_memory=memory)
    data = view(tmp_path, trace).data
    assert (data["layers"], data["heads"]) == (LAYERS, HEADS)
    assert [(life["life"], len(life["logical"])) for life in data["lives"]] == list(lives)
    found = [rows for life in data["lives"] for rows in held_sets(life, LAYERS, HEADS)]
    assert found == [[[set(head) for head in layer] for layer in kept.tolist()] for kept in trace.kept]
    for key, expected in (("logical", trace.logical_length), ("before", trace.resident_before)):
        assert [n for life in data["lives"] for n in life[key]] == expected.tolist()
    assert [n for life in data["lives"] for n in life["after"]] == [BUDGET] * len(trace.kept)


def test_survivor_counts_may_differ_between_compactions(tmp_path):
    first = torch.arange(6).expand(1, 1, 6).int()
    second = torch.tensor([[[0, 7]]], dtype=torch.int32)
    trace = make_trace()._replace(
        kept=[first, second],
        logical_length=torch.tensor([7, 9]),
        resident_before=torch.tensor([7, 8]),
        life=torch.tensor([0, 0]),
    )
    data = view(tmp_path, trace).data
    assert data["lives"][0]["after"] == [6, 2]
    assert held_sets(data["lives"][0], 1, 1) == [[[set(range(6))]], [[{0, 7}]]]


def test_returns_can_be_read_from_the_page(tmp_path):
    rows = [[0, 1, 2, 3, 6], [0, 2, 4, 5, 6], [0, 1, 4, 5, 6], [1, 2, 8, 9, 10]]
    trace = make_trace(kv_recall_memory=0.5)._replace(
        kept=[torch.tensor([[row]], dtype=torch.int32) for row in rows],
        logical_length=torch.tensor([7, 9, 9, 11]),
        resident_before=torch.tensor([7, 7, 5, 7]),
        life=torch.tensor([0, 0, 0, 0]),
    )
    data = view(tmp_path, trace).data
    assert held_sets(data["lives"][0], 1, 1) == [[[set(row)]] for row in rows]
    with pytest.raises(KVPolicyError, match="compaction 2 keeps a token that was evicted before"):
        trace_view.losses_of(trace.kept, trace.logical_length.tolist(), may_return=False)


def test_text_sentences_pairs_and_parameters(tmp_path):
    trace = make_trace(kv_budget=16, kv_policy_config={"similarity_threshold": 0.75}, huge=float("inf"))
    data = view(tmp_path, trace).data
    ids = [*trace.prompt_token_ids.tolist(), *trace.output_token_ids.tolist()]
    assert data["ids"] == ids
    assert data["prompt"] == 6
    assert data["tokens"] == len(data["texts"]) == len(ids)
    assert "".join(data["texts"]) == tokenizer().decode(ids)
    assert data["sentences"] == [[6, 10], [10, 15], [15, 18]]
    assert data["pairs"] == [[0, 2, 0.875], [1, 2, 0.75]]
    assert data["parameters"]["kv_budget"] == "16"
    assert data["parameters"]["kv_policy_config"] == '{"similarity_threshold": 0.75}'
    assert data["parameters"]["huge"] == "Infinity"
    assert data["notes"] == []
    assert data["end"] == len(ids) - 1, "the last sampled token is never computed"


def test_what_a_requests_steering_came_to(tmp_path):
    told = {"vector": "math", "alpha0": 1.25, "gamma": 0.02, "steered_tokens": 12}
    counts = {"execution": 30, "reflection": 5, "transition": 2}
    shown = view(tmp_path, make_trace(request_steering=told | counts)).data["steering"]
    assert shown == {
        "steering": "math, alpha 1.25 + 0.02 per non-execution thought",
        "steered tokens": "12",
        "thoughts": "30 execution, 5 reflection, 2 transition",
    }
    for unsteered in (None, "math", 3):
        assert view(tmp_path, make_trace(request_steering=unsteered)).data["steering"] == {}
    assert view(tmp_path, make_trace(request_steering={"vector": NASTY})).data["steering"]["steered tokens"] == "?"


def test_a_request_that_was_never_compacted(tmp_path):
    trace = make_trace(())
    data = view(tmp_path, trace).data
    assert data["lives"] == []
    assert (data["layers"], data["heads"]) == (0, 0)
    assert data["end"] == data["tokens"] - 1


def test_a_request_that_was_aborted_before_it_answered(tmp_path):
    trace = make_trace(())._replace(
        output_token_ids=torch.zeros(0, dtype=torch.int64), sentences=torch.zeros(0, 2, dtype=torch.int64)
    )
    data = view(tmp_path, trace).data
    assert data["end"] == data["tokens"] == data["prompt"] == 6
    assert len(data["notes"]) == 1, "pairs of missing sentences are left out with a note"
    assert data["pairs"] == []


def test_a_compaction_may_run_ahead_of_the_text(tmp_path):
    trace = make_trace(extra=0)
    trace = trace._replace(output_token_ids=trace.output_token_ids[:-2])
    data = view(tmp_path, trace).data
    assert data["tokens"] == int(trace.logical_length[-1]) == len(data["texts"]) + 1
    assert data["end"] == data["tokens"]
    assert "beyond the end" in data["notes"][0]


def test_characters_of_several_tokens_belong_to_the_last_of_them():
    ids = encode("a 😀é日本\n")
    texts = trace_view.token_texts(tokenizer(), ids)
    assert "".join(texts) == "a 😀é日本\n"
    assert len(texts) == len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_bytes_that_are_no_character_are_shown_and_harm_nothing_else():
    emoji = encode("😀")
    assert len(emoji) > 1, "this character is a single token; choose another one"
    for broken in (emoji[:-1], emoji[1:], emoji[1:] * 5, emoji[:1] * 9):
        texts = trace_view.token_texts(tokenizer(), [*encode("so"), *broken, *encode("that is it")])
        assert len(texts) == len(encode("so")) + len(broken) + len(encode("that is it"))
        assert "".join(texts).startswith("so\N{REPLACEMENT CHARACTER}")
        assert "".join(texts).endswith("that is it")
    assert trace_view.token_texts(tokenizer(), emoji[:1]) == ["\N{REPLACEMENT CHARACTER}"]


def test_tokens_unknown_to_the_tokenizer_are_numbers(tmp_path):
    trace = make_trace()
    trace.output_token_ids[2] = 10**6
    data = view(tmp_path, trace).data
    assert data["texts"][8] == "⟨1000000⟩"
    assert "tokens not in the tokenizer: 1" in data["notes"][0]
    assert data["texts"][9:] == view(tmp_path, make_trace()).data["texts"][9:]


def test_markup_in_text_and_parameters_stays_text(tmp_path):
    harmless = view(tmp_path, make_trace(text="so"))
    page = view(tmp_path, make_trace(text=NASTY, request_id=NASTY, **{NASTY: {"a": NASTY}}))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert page.texts["script"][1:] == harmless.texts["script"][1:], "text of the trace became part of the program"
    assert NASTY in "".join(page.data["texts"])
    assert page.data["parameters"]["request_id"] == NASTY
    assert json.loads(page.data["parameters"][NASTY]) == {"a": NASTY}
    assert page.texts["title"] == [f"KV trace {NASTY}"]


def test_the_page_needs_no_other_file(tmp_path):
    page = view(tmp_path, make_trace())
    for tag, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:"), f"{tag} {name}"
    rules = [a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv")]
    assert len(rules) == 1
    assert rules[0].startswith("default-src 'none';")
    assert "http" not in rules[0]
    program = page.texts["script"][1] + page.texts["style"][0]
    assert set(re.findall(r"https?://[^'\"]*", program)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in program
