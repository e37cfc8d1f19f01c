"""Blocks for the drafts of speculative decoding: promised, printed by the banner, and planned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from skipkv_vllm.capacity import ModelShape, Pool, capacity, most_rows
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.limits import DraftSlots
from tests.unit.test_capacity import say

SHAPE = ModelShape(28, 28, 4, 128, 3584, 152064, 2)
POOL = Pool(num_blocks=5000, block_size=16, max_num_seqs=512, max_length=32768, max_tokens=2048)
CONFIG = KVPolicyConfig(kv_policy="skipkv", kv_budget=1024)


def test_a_request_takes_the_slots_of_its_drafts():
    plain, drafting = (capacity(CONFIG, SHAPE, replace(POOL, num_draft_slots=n), length=8192) for n in (0, 6))
    assert plain.request_blocks == (1024 + 128) // 16
    assert drafting.request_blocks == plain.request_blocks + 1
    assert drafting.request_blocks_full == plain.request_blocks_full + 1
    assert drafting.fit == 5000 // drafting.request_blocks
    assert most_rows(CONFIG, replace(POOL, num_draft_slots=6)) < most_rows(CONFIG, POOL)


@pytest.mark.parametrize("policy", ["skipkv", "full"])
def test_a_promise_covers_them(policy):
    resolved = RequestOptions(kv_policy=policy).resolve(CONFIG, 100)
    plain = resolved.demand(2000, 16).num_tokens
    assert resolved.demand(2000, 16, drafts=DraftSlots(6)).num_tokens == plain + 6
    assert resolved.demand(2000, 16, drafts=DraftSlots(6, plain + 2)).num_tokens == plain + 2
    assert resolved.demand(2000, 16, drafts=DraftSlots(6, plain)).num_tokens == plain


def test_plan_counts_them(capsys):
    arguments = ("--kv-memory", "0.25", "--dtype", "float32", "--json")
    blocks = {}
    for drafts in (0, 3):
        code, out, _ = say(capsys, *arguments, "--num-speculative-tokens", str(drafts))
        assert code == 0
        blocks[drafts] = json.loads(out)["capacity"]["request_blocks"]
        assert any("drafter" in note for note in json.loads(out)["notes"]) == bool(drafts)
    assert blocks[3] == blocks[0] + 1


def test_plan_refuses_what_a_server_refuses(capsys):
    arguments = ("--kv-memory", "0.25", "--num-speculative-tokens", "3", "--pipeline-parallel-size", "2")
    code, _, error = say(capsys, *arguments)
    assert code != 0
    assert "--num-speculative-tokens 3: a server refuses drafts in a pipeline" in error
    code, _, error = say(capsys, "--kv-memory", "0.25", "--num-speculative-tokens", "-1")
    assert "--num-speculative-tokens -1 is out of range; allowed: 0 or more" in error
