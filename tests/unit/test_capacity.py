"""The capacity arithmetic: against the buffers that are really allocated, a count by hand, and the command's words."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen3NextConfig

from skipkv_vllm import bundled_gates, bundled_model
from skipkv_vllm.banner import banner
from skipkv_vllm.capacity import ModelShape, Pool, blocks_with_policy, capacity, most_rows, reserved_rows
from skipkv_vllm.cli import main
from skipkv_vllm.cli.plan_options import plan
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.limits import OtherGroups, window_group
from skipkv_vllm.core.needs import REPEATS, Need
from skipkv_vllm.policies.base import SentenceOptions
from skipkv_vllm.scheduler.admission import Ledger
from skipkv_vllm.sentences.tables import build_tables
from skipkv_vllm.worker.signals.queries import QueryRing
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker

SHAPE = ModelShape(28, 28, 4, 128, 3584, 152064, 2)
POOL = Pool(num_blocks=5000, block_size=16, max_num_seqs=64, max_length=32768, max_tokens=2048)
CONFIG = KVPolicyConfig(kv_policy="skipkv", kv_budget=1024)


@pytest.mark.parametrize("kept", [1, 8, 32])
@pytest.mark.parametrize("slots", [1, 7])
def test_the_ring_takes_what_was_counted(kept, slots):
    ring = QueryRing(
        num_layers=3, num_rows=slots, window=kept, num_kept=kept, num_heads=6, head_size=16, max_tokens=50,
        dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    assert ModelShape(3, 6, 2, 16, 96, 500, 2).ring_bytes(kept, slots, 50) == ring.nbytes


@pytest.mark.parametrize(
    ("policy", "parameters", "need"),
    [
        ("rkv", {}, Need.NOTHING),
        ("skipkv", {}, Need.RECURRENCE),
        ("skipkv", {"compat": "paper", "max_sentences": 9}, Need.HIDDEN),
    ],
    ids=["sentences", "text", "embeddings"],
)
@pytest.mark.parametrize("slots", [1, 7])
def test_the_tracker_takes_what_was_counted(policy, parameters, need, slots):
    from transformers import AutoTokenizer

    config = KVPolicyConfig(kv_granularity="sentence", kv_policy=policy, kv_policy_config=parameters)
    assert config.needs & REPEATS == need
    tracker = SentenceTracker(
        build_tables(AutoTokenizer.from_pretrained(bundled_model()), "default"), SentenceOptions(max_sentences=9),
        num_rows=slots, max_length=100, hidden_size=48 if need is Need.HIDDEN else 0, vocab_size=503,
        dtype=torch.float32, device=torch.device("cpu"), keeps_text=need is Need.RECURRENCE,
    )  # fmt: skip
    shape = ModelShape(2, 4, 2, 32, 48, 503, 4)
    assert shape.tracker_bytes(config, slots, 100) == tracker.nbytes


def test_a_count_by_hand():
    found = capacity(CONFIG, SHAPE, POOL, length=8192, prompt=100)
    assert found.kv_bytes == 28 * 4 * 128 * 2 * 2
    assert found.sidecar_bytes == 28 * 4 * 4 * 3  # position, error, number of queries
    # 32 queries in each of 28 layers and 28 heads; of each token its id, the end of a sentence and its penalty, and a
    # place more of each, where writes go that must go nowhere; of the request 29 bytes.
    ring, text = 28 * 28 * 128 * 2 * (64 * 32 + 1) + 8 * 2048, 64 * (3 * 4 * 32769 + 29) + 152064
    assert SHAPE.state_bytes(CONFIG, 64, POOL) == ring + text
    assert found.state_bytes == -(-(ring + text) // 64)
    assert (found.request_blocks, found.request_blocks_full) == (1152 // 16, 8192 // 16)
    assert found.request_bytes == 1152 * (57344 + 3 * 448) + found.state_bytes
    assert found.request_bytes_full == 8192 * 57344
    assert (found.fit, found.concurrency, found.is_capped) == (69, 64, True)
    assert "69 such requests fit at once instead of 10; max_num_seqs lets 64 run instead of 10" in found.lines()
    assert not capacity(CONFIG, SHAPE, replace(POOL, num_blocks=4000), length=8192).is_capped
    memory = 5000 * 16 * (57344 + 3 * 448) + SHAPE.state_bytes(CONFIG, 64, POOL)
    assert found.blocks_full == memory // (16 * 57344)
    assert found.concurrency_full == found.fit_full == found.blocks_full // 512


def test_a_long_protected_prompt_raises_the_bound():
    assert capacity(CONFIG, SHAPE, POOL, prompt=2000).bound == 2000 + 8 + 128
    assert capacity(KVPolicyConfig(kv_policy="skipkv", kv_protect_prompt=False), SHAPE, POOL, prompt=2000).bound == 1152


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"kv_policy": "snapkv", "kv_defer_prompt": True}, 126),
        ({"kv_policy": "finch", "kv_defer_prompt": True}, 2000 / 16),
        # Beside what it holds, blocks for a copy and the tokens that are computed on it.
        ({"kv_policy": "laq"}, 1152 / 16 + (1024 + 16) / 16),
        ({"kv_policy": "laq", "kv_defer_prompt": True}, 2000 / 16 + (1024 + 16) / 16),
        ({"kv_policy": "finch", "kv_policy_config": {"ask_chunks": True}}, 1152 / 16 + 1),
    ],
)
def test_a_long_prompt_takes_what_its_request_is_promised(options, blocks):
    config = KVPolicyConfig(kv_protect_prompt=False, **options)
    found = capacity(config, SHAPE, POOL, length=8192, prompt=2000)
    assert found.request_blocks == blocks
    demand = RequestOptions().resolve(config, 2000).demand(8192, POOL.block_size)
    ledger = Ledger(POOL.num_blocks, POOL.block_size, is_bounded=True)
    for number in range(found.fit + 1):
        assert ledger.fits(demand, []) == (number < found.fit)
        ledger.admit(demand, [])
    assert capacity(config, SHAPE, POOL, length=8192, prompt=100).request_blocks == 1152 / 16


def test_break_even_is_where_the_costs_cross():
    found = capacity(CONFIG, SHAPE, POOL)
    with_policy = 72 * 16 * (found.kv_bytes + found.sidecar_bytes) + found.state_bytes

    def without(length: int) -> int:
        return -(-length // 16) * 16 * found.kv_bytes

    assert without(found.break_even) > with_policy >= without(found.break_even - 1)


def test_a_policy_that_adds_attention_up_pays_for_it():
    rkv, h2o, skipkv, both = (
        capacity(KVPolicyConfig(kv_policy=policy, kv_request_policies=further), SHAPE, POOL)
        for policy, further in (("rkv", []), ("h2o", []), ("skipkv", []), ("rkv", ["h2o", "skipkv"]))
    )
    assert "+ 448 for its position," in rkv.lines()[0]
    assert "+ 896 for its position and attention," in h2o.lines()[0]
    assert "+ 1,344 for its position, output error and query count," in skipkv.lines()[0]
    assert "+ 1,792 for its position, attention, output error and query count," in both.lines()[0]
    for found, number in ((rkv, 1), (h2o, 2), (skipkv, 3), (both, 4)):
        assert found.sidecar_bytes == number * 448
    # The queries of 32 tokens instead of those of the window, and the text.
    assert h2o.state_bytes - rkv.state_bytes == 28 * 28 * 128 * 2 * (32 - 8)
    assert skipkv.state_bytes > h2o.state_bytes


def test_the_papers_rule_takes_embeddings_instead():
    paper = KVPolicyConfig(kv_policy="skipkv", kv_policy_config={"compat": "paper"})
    found = capacity(paper, SHAPE, POOL)
    assert found.sidecar_bytes == 448
    ring = 28 * 28 * 128 * 2 * (64 * 8 + 1) + 8 * 2048
    # 256 embeddings and one that is nobody's, and the sum of the sentence being written; two numbers a token.
    sentences = 64 * (257 * 3584 * 2 + 3584 * 4 + 2 * 4 * 32769 + 29) + 152064 + 8 * 256
    assert SHAPE.state_bytes(paper, 64, POOL) == ring + sentences


@pytest.mark.parametrize(
    ("admission", "num_blocks", "most", "rows"),
    [
        ("bounded", 72 * 5, 1024, 10),
        ("bounded", 72 * 5 + 71, 1024, 10),
        ("bounded", 72 * 5, 4, 4),
        ("bounded", 7, 1024, 1),
        ("optimistic", 72 * 5, 1024, 1024),
    ],
)
def test_there_is_state_for_as_many_requests_as_the_pool_can_hold(admission, num_blocks, most, rows):
    config = KVPolicyConfig(kv_policy="skipkv", kv_admission=admission)
    pool = replace(POOL, num_blocks=num_blocks, max_num_seqs=most)
    assert most_rows(config, pool) == rows
    found = capacity(config, SHAPE, pool)
    assert found.rows == rows
    assert f"for each of {rows:,} requests at most" in found.lines()[0]


def test_memory_for_many_requests_is_not_spent_on_state_that_none_can_use():
    fewer, pool = replace(POOL, max_num_seqs=2048), replace(POOL, max_num_seqs=4096)
    for memory in (10 * 2**30, 40 * 2**30, 2**30, 2**20):
        few, many = (blocks_with_policy(CONFIG, SHAPE, memory, each) for each in (fewer, pool))
        assert few == many
        # What is reserved covers what the pool turns out to hold, and hardly more.
        reserved = reserved_rows(CONFIG, SHAPE, memory, pool)
        assert 0 <= reserved - most_rows(CONFIG, replace(pool, num_blocks=max(many, 0))) <= 2
    assert reserved_rows(CONFIG, SHAPE, 40 * 2**30, POOL) == 64


def test_pages_and_their_memory_are_inverse():
    for memory in (10 * 2**30, 10 * 2**30 + 12345):
        blocks = blocks_with_policy(CONFIG, SHAPE, memory, POOL)
        full = capacity(CONFIG, SHAPE, replace(POOL, num_blocks=blocks)).blocks_full
        assert memory // (16 * 57344) - full in (0, 1)


def test_groups_with_a_window_take_blocks_beside_the_group_that_is_compacted():
    others = OtherGroups((window_group(512, 16),) * 5, max_in_flight=4096, num_steps=3)
    # Gemma 3 270M: 15 layers with a window, 3 with full attention.
    shape = ModelShape(3, 4, 1, 256, 640, 262144, 2, num_pooled_layers=3)
    pool = Pool(5000, 16, 64, 32768, 2048, others)
    found = capacity(CONFIG, shape, pool, length=8192, prompt=100)
    beside = 5 * (32 + 2)
    assert (found.request_blocks, found.request_blocks_full) == (72 + beside, 512 + beside)
    # Its prompt is computed up to the bound, and by the buffer more after each of two compactions in flight.
    assert found.in_flight == 5 * (1024 + 3 * 128) // 16
    # One that is shorter than the window has no more blocks there than tokens, in flight or not.
    assert capacity(CONFIG, shape, pool, length=300).in_flight == 0
    # One that keeps all its tokens holds them, the windows, and as much as can be in flight.
    assert found.room == 16 * (5000 - beside - 5 * 4096 // 16) > 8192
    small = capacity(CONFIG, shape, replace(pool, num_blocks=600))
    assert small.room == 16 * 100, "a group with a window holds as many blocks of a short request"
    assert found.fit == (5000 - found.in_flight) // (72 + beside)
    assert f"{beside} of them are of layers with a sliding window" in "\n".join(found.lines())
    demand = RequestOptions.parse(None, CONFIG, 8192).resolve(CONFIG, 100).demand(8192, 16, others)
    ledger = Ledger(5000, 16, is_bounded=True)
    promises = []
    for number in range(found.fit + 1):
        assert ledger.fits(demand, []) == (number < found.fit)
        if number < found.fit:
            promises.append(ledger.settle(ledger.admit(demand, [])))
    assert ledger.num_promised == found.fit * found.request_blocks
    for promise in promises:
        ledger.release(promise)
    assert ledger.num_promised == 0


# ---- the command


TINY = ["plan", "--model", bundled_model(), "--kv-budget", "224", "--max-num-seqs", "16"]


def say(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_flags_of_the_server_have_its_defaults():
    options = inspect.signature(plan).parameters
    for name in ("kv_budget", "kv_buffer", "kv_window", "kv_granularity", "kv_protect_prompt"):
        assert options[name].default == KVPolicyConfig.model_fields[name].default


def test_plan_and_banner_share_their_numbers(capsys):
    code, out, _ = say(capsys, "--kv-memory", "0.25", "--dtype", "float32", "--block-size", "32", "--json")
    assert code == 0
    told = json.loads(out)["capacity"]
    pool = Pool(told["blocks"], 32, 16, 4096, 2048)
    found = capacity(KVPolicyConfig(kv_policy="skipkv", kv_budget=224), ModelShape(4, 4, 2, 32, 128, 503, 4), pool)
    assert vars(found) == told
    _, out, _ = say(capsys, "--kv-memory", "0.25", "--dtype", "float32", "--block-size", "32")
    lines = banner(KVPolicyConfig(kv_policy="skipkv", kv_budget=224), found, 4096, is_async=True)
    for line in found.lines():
        assert line in out
        assert f"SkipKV: {line}" in lines


def test_a_cache_of_8_bits_holds_more(capsys):
    def kv_bytes(*arguments):
        _, out, _ = say(capsys, "--kv-memory", "0.25", "--dtype", "bfloat16", "--json", *arguments)
        return json.loads(out)["capacity"]["kv_bytes"]

    assert kv_bytes("--kv-cache-dtype", "fp8") * 2 == kv_bytes("--kv-cache-dtype", "bfloat16") == kv_bytes()


def test_parameters_are_counted(capsys):
    _, out, _ = say(capsys, "--gpu-memory", "8", "--dtype", "float32", "--json")
    memory = json.loads(out)["memory"]
    with safe_open(Path(bundled_model(), "model.safetensors"), "pt") as weights:
        assert memory["weights"] == -sum(weights.get_tensor(name).nbytes for name in weights.keys())  # noqa: SIM118
    assert memory["for KV, with positions"] < 8 * 2**30 * 0.92


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --gpu-memory"),
        (["--gpu-memory", "1", "--overhead-memory", "2"], "0 blocks of 16 tokens are left for KV"),
        (["--gpu-memory", "-1"], "--gpu-memory -1 is out of range"),
        (["--gpu-memory", "nan"], "--gpu-memory nan is out of range"),
        (["--kv-memory", "inf"], "--kv-memory inf is out of range"),
        (["--gpu-memory", "8", "--block-size", "0"], "--block-size 0 is out of range"),
        (["--gpu-memory", "8", "--activation-memory", "-1"], "-1 is out of range; allowed: 0 or more"),
        (["--gpu-memory", "8", "--length", "9999"], "length of 9999 tokens is out of range; allowed: 1 to 4096"),
        (["--gpu-memory", "8", "--max-model-len", "9999"], "--max-model-len 9999 is out of range"),
        (["--gpu-memory", "8", "--prompt", "5000"], "--prompt 5000 is out of range"),
        (["--gpu-memory", "8", "--kv-policy", "full"], "nothing to plan"),
        (["--gpu-memory", "8", "--dtype", "int4"], "--dtype int4 is unknown"),
        (["--gpu-memory", "8", "--kv-cache-dtype", "int4"], "--kv-cache-dtype int4 is unknown"),
        (["--gpu-memory", "8", "--tensor-parallel-size", "3"], "does not divide the 4 query heads"),
        (["--gpu-memory", "8", "--pipeline-parallel-size", "5"], "is more than the 4 layers"),
        (["--gpu-memory", "8", "--gpu-memory-utilization", "1.5"], "allowed: up to 1"),
    ],
)
def test_bad_input_is_refused(capsys, arguments, said):
    code, _, err = say(capsys, *arguments)
    assert code == 2
    assert said in err


def test_ranks_share_heads_and_stages_share_layers(capsys):
    def told(*arguments: str) -> dict:
        return json.loads(say(capsys, "--gpu-memory", "8", "--dtype", "float32", "--json", *arguments)[1])

    alone, ranks, stages, both = (
        told(*("--tensor-parallel-size", str(tensor), "--pipeline-parallel-size", str(pipeline)))
        for tensor, pipeline in ((1, 1), (2, 1), (1, 3), (4, 2))
    )
    kv = alone["capacity"]["kv_bytes"]
    # Three stages of four layers: the largest has two. Two kv heads on four ranks: each holds one.
    assert [t["capacity"]["kv_bytes"] for t in (ranks, stages, both)] == [kv // 2, kv // 2, kv // 4]
    assert [t["gpus"] for t in (alone, ranks, stages, both)] == [1, 2, 3, 8]
    embeddings = 503 * 128 * 4
    # The last stage holds half of the layers and one of the two embeddings.
    assert stages["memory"]["weights"] == (alone["memory"]["weights"] + 2 * embeddings) // 2 - embeddings


def test_kv_heads_that_cannot_be_shared_are_refused(capsys, tmp_path):
    config = json.loads(Path(bundled_model(), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6, "num_key_value_heads": 2}))
    code, _, err = say(capsys, "--gpu-memory", "8", "--model", str(tmp_path), "--tensor-parallel-size", "3")
    assert code == 2
    assert "neither divides nor is a multiple of the 2 kv heads" in err


def test_gates_of_another_model_are_refused(capsys, tmp_path):
    config = json.loads(Path(bundled_model(), "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 256}))
    gates = ["--kv-memory", "1", "--kv-policy", "trimkv", "--kv-policy-config", json.dumps({"gates": bundled_gates()})]
    assert "queries, sentences and gates of 16 requests" in say(capsys, *gates)[1]
    code, _, err = say(capsys, *gates, "--model", str(tmp_path))
    assert code == 2
    assert "whose hidden size is 128, but this model's is 256" in err


def test_assumed_settings_are_said(capsys):
    large = ["--gpu-memory", "192", "--overhead-memory", "0", "--max-num-seqs", "16"]
    assert "note: assumed --max-num-batched-tokens 16384, the default of vLLM's server" in say(capsys, *large)[1]
    assert "vLLM's server" not in say(capsys, *large, "--max-num-batched-tokens", "512")[1]


def test_a_prompt_that_does_not_fit_is_said(capsys):
    code, out, _ = say(capsys, "--kv-memory", "0.003", "--block-size", "32", "--length", "4000", "--prompt", "3000")
    assert code == 0
    assert "note: no request of 4000 tokens with a prompt of 3000 fits" in out


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (["linear_attention", "full_attention"] * 2, "linear_attention in a model other than qwen3_next"),
        (["sliding_attention"] * 4, "sliding_attention"),
        (["full_attention"] * 3 + ["sliding_attention"], "3 full and fewer sliding layers"),
    ],
)
def test_models_that_policies_refuse_are_refused(capsys, tmp_path, kinds, found):
    config = json.loads(Path(bundled_model(), "config.json").read_text())
    config |= {"layer_types": kinds, "sliding_window": 64, "use_sliding_window": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = say(capsys, "--gpu-memory", "8", "--model", str(tmp_path))
    assert code == 2
    assert f"found {found}" in err


def test_layers_with_a_window_are_counted(capsys, tmp_path):
    config = json.loads(Path(bundled_model(), "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"] * 2
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"layer_types": kinds, "sliding_window": 64, "use_sliding_window": True})
    )
    code, out, _ = say(capsys, "--kv-memory", "1", "--model", str(tmp_path), "--length", "2000")
    assert code == 0
    # Two groups of two layers: 22 blocks for the bound, 6 for the window.
    assert "a request of 2,000 tokens holds at most 28 blocks instead of 131" in out
    assert "6 of them are of layers with a sliding window" in out
    code, _, err = say(capsys, "--kv-memory", "1", "--model", str(tmp_path), "--pipeline-parallel-size", "2")
    assert code == 2
    assert "a server refuses stages of a model with a sliding window" in err


def test_states_are_counted_and_what_a_budget_buys_is_said(capsys, tmp_path):
    Qwen3NextConfig(num_experts=8).save_pretrained(tmp_path)
    arguments = ["--kv-memory", "8", "--model", str(tmp_path), "--length", "20000", "--kv-budget", "1024"]
    code, out, _ = say(capsys, *arguments)
    assert code == 0
    # Three groups of states, each with the running one and the one of the last whole block.
    assert "blocks of 544 tokens" in out
    assert "a request of 20,000 tokens holds at most 9 blocks instead of 43" in out
    assert "6 of them are of layers with a state, which are not compacted; while its prompt is computed, it may" in out
    assert (
        "only whole blocks are freed: the bound of 1,152 tokens takes 3 of them, so nothing is freed of a request of "
        "up to 1,632 tokens, and --kv-budget 1,504 takes no more"
    ) in out
    code, out, _ = say(capsys, *arguments, "--kv-budget", "1504", "--json")
    larger = json.loads(out)["capacity"]
    assert (larger["request_blocks"], larger["bound"]) == (9, 3 * 544)
    assert "blocks of 1056 tokens" in say(capsys, *arguments, "--mamba-ssm-cache-dtype", "float32")[1]
    assert say(capsys, *arguments, "--mamba-ssm-cache-dtype", "int8")[0] == 2


def test_small_blocks_need_no_word_about_rounding():
    found = capacity(CONFIG, SHAPE, POOL)
    assert "only whole blocks" not in "\n".join(found.lines())
