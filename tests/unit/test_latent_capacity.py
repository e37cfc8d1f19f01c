"""Memory of models with latents (MLA), as a configuration says, and what `skipkv plan` counts and refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from skipkv_vllm.capacity import ModelShape, groups_of, kv_of, shape_of, unsupported
from skipkv_vllm.cli import main
from skipkv_vllm.config import KVPolicyConfig

DEEPSEEK_V3: dict[str, Any] = {}
KIMI_K2 = {"num_attention_heads": 64, "num_key_value_heads": 64, "vocab_size": 163840, "n_routed_experts": 384}
MODELS = pytest.mark.parametrize(
    ("changes", "query_heads", "vocabulary"),
    [(DEEPSEEK_V3, 128, 129280), (KIMI_K2, 64, 163840)],
    ids=["DeepSeek-V3", "Kimi-K2"],
)


@MODELS
@pytest.mark.parametrize("ranks", [1, 8, 64])
def test_a_rank_has_one_latent_a_token_and_its_share_of_the_queries(changes, query_heads, vocabulary, ranks):
    config = DeepseekV3Config(**changes)
    assert unsupported(config) is None
    assert kv_of(config) == (1, 576)
    assert groups_of(config, 64, ranks) == (61, 0, 61, 64, 64)
    shape = shape_of(config, ranks=ranks, element_size=2)
    assert shape == ModelShape(61, query_heads // ranks, 1, 576, 7168, vocabulary, 2, None, 61, 192)
    of_layer = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert 64 * shape.kv_bytes == 61 * of_layer.page_size_bytes
    # Recorded before they are absorbed; one entry more takes what no request needs.
    queries = 61 * (query_heads // ranks) * 192 * 2
    assert shape.ring_bytes(8, 4, 100) == (4 * 8 + 1) * queries + 8 * 100


def test_a_kimi_is_counted_by_its_language_model():
    config = AutoConfig.for_model("kimi_k25").get_text_config()
    assert unsupported(config) is None
    assert (kv_of(config), shape_of(config, ranks=1, element_size=2).query_size) == ((1, 576), 192)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"index_topk": 2048}, "native sparse attention"),
        ({"compress_ratios": [4, 128]}, "latents of several tokens"),
        ({"linear_attn_config": {"kda_layers": [1]}}, "layers that keep a state beside latents"),
        ({"qk_rope_head_dim": 32}, "latents (MLA) with 32 rotated features, of which operators read those with 64"),
        ({"kv_lora_rank": 1024}, "latents (MLA) of 1024 features, of which kernels for GPUs take up to 512"),
        ({"kv_lora_rank": 500}, "latents (MLA) of 500 features, of which kernels for GPUs take up to 512, in steps"),
    ],
)
def test_what_a_server_refuses_is_not_planned(capsys, tmp_path, changes, found):
    DeepseekV3Config(**changes).save_pretrained(tmp_path)
    code, _, said = say(capsys, tmp_path)
    assert code == 2
    assert f"found {found}" in said


def say(capsys: pytest.CaptureFixture, model: Any, *arguments: str) -> tuple[int, str, str]:
    options = ("--kv-memory", "40", "--block-size", "64", "--max-num-seqs", "16", "--kv-budget", "4096")
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", str(model), *options, *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


@MODELS
def test_a_plan_counts_latents(capsys, tmp_path, changes, query_heads, vocabulary):
    DeepseekV3Config(**changes, max_position_embeddings=131072).save_pretrained(tmp_path)
    found = {}
    for ranks in (1, 8):
        code, out, _ = say(
            capsys, tmp_path, "--tensor-parallel-size", str(ranks), "--kv-policy", "rkv", "--length", "32768", "--json"
        )
        assert code == 0
        found[ranks] = json.loads(out)["capacity"]
    assert found[1]["kv_bytes"] == found[8]["kv_bytes"] == 61 * 576 * 2
    # Queries of the window, of which a rank has its share.
    window = KVPolicyConfig(kv_policy="rkv").kv_window
    assert found[1]["state_bytes"] >= window * 61 * query_heads * 192 * 2
    assert 7.5 <= found[1]["state_bytes"] / found[8]["state_bytes"] <= 8.5
    assert found[1]["request_blocks"] < found[1]["request_blocks_full"] == 32768 // 64
    code, _, said = say(capsys, tmp_path, "--kv-cache-dtype", "fp8")
    assert code == 2
    assert "--kv-cache-dtype fp8: a server refuses latents (MLA) of 8 bits" in said
