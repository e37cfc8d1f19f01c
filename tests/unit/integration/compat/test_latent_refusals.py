"""Models with latents (MLA), and the attention that reads them, which are served or refused at start-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import MLAAttentionSpec

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat import refusals
from skipkv_vllm.integration.compat import version as version_check
from tests.unit.integration.compat.test_refusals import groups_of, latents
from tests.unit.integration.compat.vllm_configs import make_vllm_config


def test_latents_are_served_where_operators_read_them(monkeypatch):
    from vllm.platforms import current_platform

    policy, large = KVPolicyConfig(kv_policy="skipkv"), make_vllm_config(**latents(kv_lora_rank=1024))
    for config in (make_vllm_config(**latents()), large):
        compat.check_config(config, policy)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    with pytest.raises(KVPolicyError, match=r"latents \(MLA\) on GPUs other than NVIDIA's: .*decoder-only model"):
        compat.check_config(make_vllm_config(**latents()), policy)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda _: True)
    compat.check_config(make_vllm_config(**latents()), policy)
    for config in (large, make_vllm_config(**latents(kv_lora_rank=500))):
        with pytest.raises(
            KVPolicyError, match=r"latents \(MLA\) of \d+ features, of .* up to 512, in steps of 16: no"
        ):
            compat.check_config(config, policy)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2", "fp8_ds_mla", "nvfp4"])
def test_latents_of_other_numbers_are_refused(dtype):
    config = make_vllm_config(**latents(), cache_config__cache_dtype=dtype)
    with pytest.raises(
        KVPolicyError, match=rf"--kv-cache-dtype {dtype} of latents \(MLA\): .*Use --kv-cache-dtype auto"
    ):
        compat.check_config(config, KVPolicyConfig(kv_policy="rkv"))
    config.cache_config.cache_dtype = "bfloat16"
    compat.check_config(config, KVPolicyConfig(kv_policy="rkv"))


def test_latents_of_8_bits_that_a_checkpoint_chose_are_refused():
    sizes = {"block_size": 64, "num_kv_heads": 1, "head_size": 576}
    found = groups_of(KVPolicyConfig(kv_policy="rkv"), MLAAttentionSpec(**sizes, dtype=torch.bfloat16))
    assert found.spec.head_size == 576
    with pytest.raises(KVPolicyError, match=r"latents \(MLA\) of 8 bits: .*Use --kv-cache-dtype bfloat16"):
        groups_of(KVPolicyConfig(kv_policy="rkv"), MLAAttentionSpec(**sizes, dtype=torch.uint8))


def mla_impl(folder: str, name: str) -> Any:
    """Return attention with latents, of a class of this name; some of its modules need packages for GPUs."""
    impl = type(name, (), {"__module__": f"vllm.v1.attention.backends.mla.{folder}"})()
    impl.alibi_slopes = impl.kv_sharing_target_layer_name = impl.logits_soft_cap = None
    impl.head_size = 576
    return impl


ON_GPUS = {
    "triton_mla": "TritonMLAImpl",
    "flashmla": "FlashMLAImpl",
    "flashattn_mla": "FlashAttnMLAImpl",
    "flashinfer_mla": "FlashInferMLAImpl",
    "cutlass_mla": "CutlassMLAImpl",
}


def test_attention_with_latents_that_reads_them_by_lengths_and_tables_is_accepted_on_gpus(monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    root = version_check.vllm_root()
    for folder, name in ON_GPUS.items():
        text = (root / f"v1/attention/backends/mla/{folder}.py").read_text()
        assert f"class {name}(MLACommonImpl[" in text
        assert f'"{refusals.LATENT_BACKENDS[name]}"' in text, "the name on the command line"
        compat.check_attention([mla_impl(folder, name)])


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("tokenspeed_mla", "TokenspeedMLAImpl"),
        ("flashmla_sparse", "FlashMLASparseImpl"),
        ("flashinfer_mla_sparse", "FlashInferMLASparseImpl"),
        ("flashattn_mla_sparse", "FlashAttnMLASparseImpl"),
        ("flashattn_mla", "XPUFlashAttnMLAImpl"),
        ("rocm_aiter_mla", "AiterMLAImpl"),
        ("amx_mla", "AMXMLAImpl"),
    ],
)
def test_other_attention_with_latents_is_refused(folder, name):
    text = (version_check.vllm_root() / f"v1/attention/backends/mla/{folder}.py").read_text()
    assert f"class {name}(" in text
    with pytest.raises(
        KVPolicyError, match=rf"{name}: .*Use --attention-backend CPU_MLA, TRITON_MLA, FLASHMLA, FLASH_A"
    ):
        compat.check_attention([mla_impl(folder, name)])
