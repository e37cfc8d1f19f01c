"""Combinations of models, features and caches that are refused at start-up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.envs
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.limits import NO_OTHERS, OtherGroup, OtherGroups
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat import refusals
from skipkv_vllm.integration.compat import version as version_check
from tests.unit.integration.compat.vllm_configs import make_vllm_config


def latents(**changes: int) -> dict[str, Any]:
    """Return the changes that make a model one with latents."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64} | changes
    return {"model_config__use_mla": True, "model_config__hf_text_config": SimpleNamespace(**sizes)}


def test_a_layer_that_the_model_does_not_have_is_refused():
    config = make_vllm_config()
    config.model_config.get_total_num_hidden_layers = lambda: 4
    compat.check_config(config, KVPolicyConfig(kv_policy="rkv", kv_request_policies=["thinkv"]))
    policy = KVPolicyConfig(kv_policy="thinkv", kv_policy_config={"layers": "9,1"})
    with pytest.raises(KVPolicyError, match="kv_policy='thinkv': layers='1,9', but this model has layers 0 to 3; name"):
        compat.check_config(config, policy)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_config__runner_type": "pooling"}, ["'pooling' runner", "--runner"]),
        ({"model_config__is_encoder_decoder": True}, ["encoder-decoder", "decoder-only model"]),
        (latents(index_topk=2048), ["native sparse attention", "HiSparse"]),
        (latents(qk_rope_head_dim=32), ["latents (MLA) with 32 rotated", "64", "decoder-only model"]),
        (
            {"model_config__is_hybrid": True, "model_config__hf_text_config": SimpleNamespace(model_type="jamba")},
            ["hybrid models of the type 'jamba'", "only qwen3_next, qwen3_5_text", "decoder-only model"],
        ),
        (
            {
                "model_config__is_hybrid": True,
                "model_config__hf_text_config": SimpleNamespace(model_type="qwen3_next"),
                "cache_config__prefix_match_unit": 32,
            },
            ["--prefix-match-unit 32", "Drop --prefix-match-unit"],
        ),
        ({"model_config__is_attention_free": True}, ["state-space", "decoder-only model"]),
        ({"diffusion_config": object()}, ["diffusion models", "decoder-only model"]),
        ({"model_config__is_mm_prefix_lm": True}, ["prefix-LM", "--language-model-only"]),
        ({"kv_transfer_config": object()}, ["KV connectors", "Drop --kv-transfer-config and --kv-off"]),
        ({"parallel_config__decode_context_parallel_size": 2}, ["context parallelism", "-context-parallel-size to 1"]),
        ({"parallel_config__prefill_context_parallel_size": 2}, ["context parallelism", "-context-parallel-size to 1"]),
        ({"parallel_config__enable_dbo": True}, ["dual-batch overlap", "Drop --enable-dbo"]),
        ({"cache_config__cache_dtype": "nvfp4"}, ["--kv-cache-dtype nvfp4", "Use --kv-cache-dtype auto or fp8"]),
        ({"cache_config__cache_dtype": "fp8_per_token_head"}, ["--kv-cache-dtype fp8_per_token_head", "one scale"]),
        ({"model_config__skip_tokenizer_init": True}, ["--skip-tokenizer-init", "'skipkv'", "Drop"]),
    ],
)
def test_an_unsupported_feature_is_refused(changes, parts):
    policy = KVPolicyConfig(kv_policy="skipkv")
    with pytest.raises(KVPolicyError) as error:
        compat.check_config(make_vllm_config(**changes), policy)
    for part in ("--kv-policy does not support", *parts, "or start without --kv-policy"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, ["pipeline parallelism", "--tensor-parallel-size"]),
        ({"parallel_config__data_parallel_size": 2}, ["data parallelism", "several servers"]),
        ({"lora_config": object()}, ["LoRA", "Drop --enable-lora"]),
        ({"model_config__is_multimodal_model": True}, ["multimodal models", "text model"]),
        ({"model_config__enable_prompt_embeds": True}, ["prompt embeddings", "text model"]),
        ({"model_config__uses_mrope": True}, ["several dimensions", "text model"]),
    ],
)
@pytest.mark.parametrize("is_own", [True, False])
def test_what_tokens_decoded_ahead_cannot_go_through_is_refused(is_own, changes, parts):
    chosen = {"kv_policy": "laq"} if is_own else {"kv_policy": "rkv", "kv_request_policies": ["finch", "laq"]}
    policy = KVPolicyConfig(kv_protect_prompt=False, **chosen)
    compat.check_config(make_vllm_config(parallel_config__tensor_parallel_size=2), policy)
    compat.check_config(make_vllm_config(**changes), KVPolicyConfig(kv_policy="finch", kv_protect_prompt=False))
    with pytest.raises(KVPolicyError) as error:
        compat.check_config(make_vllm_config(**changes), policy)
    flag = "--kv-policy laq" if is_own else "--kv-request-policies laq"
    for part in (f"{flag} does not support", *parts, f"or start without {flag}"):
        assert part in str(error.value)


def test_a_server_that_steers_does_not_decode_ahead():
    policy = KVPolicyConfig(kv_policy="laq", kv_protect_prompt=False, kv_steering_vectors={"a": "/nowhere"})
    with pytest.raises(KVPolicyError, match=r"--kv-policy laq does not support steering.*Drop --kv-steering-vectors"):
        compat.check_config(make_vllm_config(), policy)


@pytest.mark.parametrize("granularity", ["head", "sentence"])
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_a_model_may_be_spread_over_ranks(granularity, backend):
    config = make_vllm_config(
        parallel_config__tensor_parallel_size=2,
        parallel_config__pipeline_parallel_size=2,
        parallel_config__distributed_executor_backend=backend,
    )
    compat.check_config(config, KVPolicyConfig(kv_policy="skipkv", kv_granularity=granularity))


def test_a_pipeline_on_rays_compiled_graphs_is_refused(monkeypatch):
    # Not by the environment variable: vLLM reads it once per process, when an engine starts.
    monkeypatch.setitem(vars(vllm.envs), "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False)
    policy = KVPolicyConfig(kv_policy="rkv")
    on_ray = {"parallel_config__distributed_executor_backend": "ray"}
    compat.check_config(make_vllm_config(**on_ray), policy)
    with pytest.raises(KVPolicyError, match=r"compiled graphs.*Unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
        compat.check_config(make_vllm_config(parallel_config__pipeline_parallel_size=2, **on_ray), policy)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("vllm.platforms.current_platform.is_fp8_fnuz", "on this GPU: it stores another float8"),
        ("vllm._custom_ops.cpu_has_amx_fp8", "on this CPU: how vLLM packs blocks for AMX-FP8"),
    ],
)
def test_8_bits_are_refused_where_their_meaning_or_their_place_is_not_known(function, reason, monkeypatch):
    config, policy = make_vllm_config(cache_config__cache_dtype="fp8"), KVPolicyConfig(kv_policy="rkv")
    compat.check_config(config, policy)
    monkeypatch.setattr(function, lambda: True)
    with pytest.raises(KVPolicyError, match=f"--kv-cache-dtype fp8 {reason}.*Use --kv-cache-dtype auto, or"):
        compat.check_config(config, policy)
    compat.check_config(make_vllm_config(), policy)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3", "fp8_e5m2"])
def test_a_plain_model_is_accepted(dtype):
    compat.check_config(make_vllm_config(cache_config__cache_dtype=dtype), KVPolicyConfig(kv_policy="skipkv"))


def test_a_tokenizer_is_needed_only_for_sentences():
    config = make_vllm_config(model_config__skip_tokenizer_init=True)
    compat.check_config(config, KVPolicyConfig(kv_policy="rkv"))
    with pytest.raises(KVPolicyError, match="granularity 'sentence'"):
        compat.check_config(config, KVPolicyConfig(kv_policy="rkv", kv_granularity="sentence"))


def groups_of(policy: KVPolicyConfig, *specs) -> compat.CacheGroups:
    config = make_vllm_config(
        additional_config={CONFIG_KEY: policy.model_dump()}, max_in_flight_tokens=256, max_concurrent_batches=2
    )
    groups = [KVCacheGroupSpec([f"layers.{i}.attn", f"layers.{i + 4}.attn"], spec) for i, spec in enumerate(specs)]
    return compat.cache_groups(config, groups)


SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
FULL, WINDOW = FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=64)


def state(**changes) -> MambaSpec:
    settings = {"block_size": 16, "mamba_cache_mode": "align"} | changes
    return MambaSpec(shapes=((4, 64),), dtypes=(torch.float32,), **settings)


def test_stages_of_a_model_with_windows_are_refused():
    kinds = ["sliding_attention", "full_attention"]
    text = SimpleNamespace(num_hidden_layers=2, layer_types=kinds, num_attention_heads=2, head_dim=8, hidden_size=16)
    config = make_vllm_config(model_config__hf_text_config=text)
    compat.check_config(config, KVPolicyConfig(kv_policy="skipkv"))
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(
        KVPolicyError, match=r"pipeline parallelism of models with a sliding.*Use --tensor-parallel-size"
    ):
        compat.check_config(config, KVPolicyConfig(kv_policy="skipkv"))


def test_groups_with_a_window_are_left_alone():
    found = groups_of(KVPolicyConfig(kv_policy="skipkv"), WINDOW, FULL, WINDOW)
    assert (found.evicting, list(found.layer_names), found.spec) == (1, ["layers.1.attn", "layers.5.attn"], FULL)
    # 63 older tokens lie in at most 5 blocks; one more when the next token begins a block.
    assert found.others == OtherGroups((OtherGroup(16, 6, 6), OtherGroup(16, 6, 6)), 256, 2)


def test_groups_with_a_state_are_left_alone():
    """With a prefix cache a request holds its state and the one that it went on from, and more while steps overlap."""
    policy = KVPolicyConfig(kv_policy="skipkv")
    found = groups_of(policy, state(), state(), FULL)
    assert (found.evicting, found.spec) == (2, FULL)
    assert [group.num_blocks(1000) for group in found.others.groups] == [2, 2]
    assert found.others.peaks(1000, 500) == (3, 3)
    assert found.others.peaks(16, 16) == (1, 1), "a request of one block has one state"
    assert found.others.at_rest == (1, 1)
    found = groups_of(policy, FULL, state(mamba_cache_mode="none", block_size=4096))
    assert found.others.peaks(1000, 500) == (1,)
    assert found.others.num_blocks(1000) == 1
    # What such a layer computes beside its state, it keeps in further blocks.
    found = groups_of(policy, FULL, state(num_prefill_checkpoint_blocks=1))
    assert found.others.peaks(1000, 500) == (4,)


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ((FULL, FULL), "FullAttentionSpec, FullAttentionSpec"),
        ((WINDOW,), "SlidingWindowSpec"),
        ((FULL, ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)), "FullAttentionSpec, ChunkedLocal"),
        ((), "none"),
    ],
)
def test_groups_that_are_not_one_of_full_attention_are_refused(specs, names):
    for policy, flag in (
        (KVPolicyConfig(kv_policy="skipkv"), "--kv-policy"),
        (KVPolicyConfig(), "--kv-steering-vectors"),
    ):
        with pytest.raises(KVPolicyError) as error:
            groups_of(policy, *specs)
        assert f"{flag} does not support this model's KV cache ({names}" in str(error.value)
        assert "one group of full-attention layers" in str(error.value)


def test_methods_that_groups_with_a_window_do_not_allow():
    ahead = KVPolicyConfig(kv_policy="laq", kv_protect_prompt=False)
    assert groups_of(ahead, FULL).others == NO_OTHERS._replace(max_in_flight=256, num_steps=2)
    beside = KVPolicyConfig(kv_policy="skipkv", kv_request_policies=["h2o", "laq"], kv_protect_prompt=False)
    for policy in (ahead, beside):
        with pytest.raises(KVPolicyError, match=r"not support 'laq' for models with a sliding window.*computes tokens"):
            groups_of(policy, FULL, WINDOW)
        with pytest.raises(KVPolicyError, match=r"a state in some layers: it computes tokens ahead"):
            groups_of(policy, FULL, state())
    chosen = KVPolicyConfig(kv_policy="thinkv", kv_policy_config={"layers": "1,3"})
    groups_of(chosen, WINDOW, FULL)
    with pytest.raises(KVPolicyError, match="layers='1,3', but only layers 0, 4 of this model have full attention"):
        groups_of(chosen, FULL, WINDOW)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"sliding_window": 64}, "attention with sliding_window=64 in the group of full attention: its mask"),
        # Like Llama 4 in vLLM, whose hybrid manager is off.
        ({"attention_chunk_size": 8192}, "attention with attention_chunk_size=8192 in the group of full attention: "),
        ({"non_causal": True}, "attention with non_causal=True in the group of full attention: its mask"),
        ({"head_size_v": 4}, "keys of 8 and values of 4"),
        ({"num_head_slots": 1}, "1 cells for 2 heads"),
        ({"state_content_bytes": 20}, "same size for every token"),
    ],
)
def test_full_attention_that_is_not_plain_is_refused(changes, part):
    with pytest.raises(KVPolicyError, match=part):
        groups_of(KVPolicyConfig(kv_policy="skipkv"), FullAttentionSpec(**SHAPE, **changes))


def test_attention_that_would_misread_compacted_pages_is_refused():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
    from vllm.v1.attention.backends.flex_attention import FlexAttentionImpl

    def layer(kind, alibi_slopes=None, kv_sharing_target_layer_name=None, logits_soft_cap=0, head_size=512):
        # Without the constructors, which need an engine's configuration.
        impl = kind.__new__(kind)
        impl.alibi_slopes, impl.kv_sharing_target_layer_name = alibi_slopes, kv_sharing_target_layer_name
        impl.logits_soft_cap, impl.head_size = logits_soft_cap, head_size
        return impl

    plain = layer(CPUAttentionBackendImpl)
    compat.check_attention([plain])
    for other, message in (
        (layer(CPUAttentionBackendImpl, alibi_slopes=[0.5]), r"ALiBi: its bias counts.*Serve a decoder-only model"),
        (layer(CPUAttentionBackendImpl, None, "layers.0"), "layers that share a cache: each layer"),
        (layer(CPUAttentionBackendImpl, logits_soft_cap=50), "attention with a soft cap of its logits: scores"),
        (layer(FlexAttentionImpl), r"FlexAttentionImpl: .*Use --attention-backend FLASH_ATTN, FLASHINFER"),
    ):
        with pytest.raises(KVPolicyError, match=f"--kv-policy does not support .*{message}"):
            compat.check_attention([plain, other])


def test_heads_that_the_kernels_for_gpus_do_not_take_are_refused_there(monkeypatch):
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    impl.alibi_slopes = impl.kv_sharing_target_layer_name = impl.logits_soft_cap = None
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    impl.head_size = 256
    compat.check_attention([impl])
    impl.head_size = 512
    with pytest.raises(KVPolicyError, match="heads of 512 on GPUs: its kernels take heads of up to 256"):
        compat.check_attention([impl])


def test_every_attention_that_is_accepted_is_watched():
    watched = {symbol.rpartition(":")[2] for symbol in version_check.tested()["symbols"]}
    # MLA has two ways to compute; its metadata tells which tokens go which.
    assert all(
        {f"{name}.forward", f"{name}.forward_mqa"} & watched for name in (*refusals.BACKENDS, *refusals.LATENT_BACKENDS)
    )


@pytest.mark.parametrize(
    ("additional", "expected"), [(None, False), ({}, False), ({"mine": 1}, False), ({"skipkv": {}}, True)]
)
def test_has_policy(additional, expected):
    assert compat.has_policy(SimpleNamespace(additional_config=additional)) is expected
