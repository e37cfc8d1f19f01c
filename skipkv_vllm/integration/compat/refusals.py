"""What a KV policy does not support yet is refused at start-up: which feature, why, what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ...core.errors import KVPolicyError
from ...core.needs import Need
from ...ops.paging import FP8_CACHES

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from ...config import KVPolicyConfig


BACKENDS = {
    "FlashAttentionImpl": "FLASH_ATTN",
    "FlashInferImpl": "FLASHINFER",
    "TritonAttentionImpl": "TRITON_ATTN",
    "CPUAttentionBackendImpl": "CPU_ATTN",
}
"""Attention implementations that were tested, and what they are called on the command line."""
OTHER_MODEL = "Serve a decoder-only model with plain attention (Qwen2, Qwen3, Llama, ...)"


def _refuse(feature: str, reason: str, remedy: str, flag: str = "--kv-policy") -> KVPolicyError:
    return KVPolicyError(f"{flag} does not support {feature}: {reason}. {remedy}, or start without {flag}")


def check_config(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    """Refuse models and features that eviction or steering would silently get wrong.

    Raises:
        KVPolicyError: for the first one found.
    """
    if policy.kv_prefix_eviction != "lru" and not vllm_config.cache_config.enable_prefix_caching:
        raise KVPolicyError(
            f"kv_prefix_eviction={policy.kv_prefix_eviction!r} would do nothing without prefix caching; drop it or "
            "--no-enable-prefix-caching"
        )
    if policy.evicts:
        _check(vllm_config, policy, _refuse)
    if policy.needs & Need.LOOKAHEAD:
        _check_lookahead(vllm_config, policy)
    if policy.steers:
        _check(vllm_config, policy, functools.partial(_refuse, flag="--kv-steering-vectors"))
        _check_steering(vllm_config, policy)


def _check(vllm_config: VllmConfig, policy: KVPolicyConfig, _refuse: Callable[..., KVPolicyError]) -> None:
    import vllm.envs as envs

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.runner_type != "generate":
        raise _refuse(f"the {model.runner_type!r} runner", "only generation grows a KV cache", "Drop --runner")
    if model.is_encoder_decoder:
        raise _refuse("encoder-decoder models", "cross attention has a cache of its own", OTHER_MODEL)
    if model.use_mla:
        raise _refuse("MLA models", "their cache holds latents, which the policies cannot score", OTHER_MODEL)
    if model.is_hybrid or model.is_attention_free:
        raise _refuse("hybrid and state-space models", "their state is not a list of tokens", OTHER_MODEL)
    if vllm_config.diffusion_config is not None:
        raise _refuse("diffusion models", "they rewrite tokens, and vLLM schedules them otherwise", OTHER_MODEL)
    if model.is_mm_prefix_lm:
        raise _refuse("prefix-LM attention", "what attends both ways is told by position", OTHER_MODEL)
    if model.get_sliding_window() is not None:
        raise _refuse("sliding-window attention", "its mask needs the positions of all tokens", OTHER_MODEL)
    if vllm_config.speculative_config is not None:
        raise _refuse("speculative decoding", "rejected tokens make token counts inexact", "Drop --speculative-config")
    if vllm_config.kv_transfer_config is not None:
        raise _refuse(
            "KV connectors",
            "they identify pages by token position, which eviction changes",
            "Drop --kv-transfer-config and --kv-offloading-size",
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise _refuse("context parallelism", "a request's pages are spread over ranks", "Set its size to 1")
    if parallel.pipeline_parallel_size > 1 and _is_compiled_ray_graph(parallel):
        raise _refuse(
            "pipeline parallelism on Ray's compiled graphs (VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0)",
            "a stage starts there when it gets the previous one's output, and stages must agree before",
            "Unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        raise _refuse(
            "vLLM's front end in Rust (VLLM_USE_RUST_FRONTEND=1)",
            "it sends requests to the engine past the check of their options",
            "Unset VLLM_USE_RUST_FRONTEND",
        )
    if parallel.enable_dbo:
        raise _refuse("dual-batch overlap", "micro-batches see only part of a step", "Drop --enable-dbo")
    if policy.evicts:
        _check_cache_dtype(vllm_config.cache_config.cache_dtype, _refuse)
    for each in policy.policies:
        chosen = each.segment_options.layers if each.needs & Need.SEGMENTS else ()
        if chosen and chosen[-1] >= (num_layers := model.get_total_num_hidden_layers()):
            raise KVPolicyError(
                f"kv_policy={each.name!r}: layers={','.join(map(str, chosen))!r}, but this model has layers 0 to "
                f"{num_layers - 1}; name some of these in kv_policy_config, or write 'all'"
            )
    if policy.gates is not None:
        _check_hooks(vllm_config, functools.partial(_refuse, flag=f"--kv-policy {policy.kv_policy}"), "what gates say")
        policy.gates.check_fits(
            hidden_size=model.get_hidden_size(),
            num_layers=model.get_total_num_hidden_layers(),
            num_kv_heads=model.get_total_num_kv_heads(),
        )
    if policy.needs & Need.SENTENCES and model.skip_tokenizer_init:
        raise _refuse(
            "--skip-tokenizer-init",
            f"{policy.kv_policy!r} with granularity {policy.kv_granularity!r} finds sentences by the tokenizer",
            "Drop --skip-tokenizer-init",
        )


def _check_lookahead(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    own, names = (
        policy.policy.lookahead_plan is not None,
        [each.name for each in policy.policies if each.lookahead_plan is not None],
    )
    flag = f"--kv-policy {policy.kv_policy}" if own else f"--kv-request-policies {' '.join(names)}"
    refuse = functools.partial(_refuse, flag=flag)
    if vllm_config.use_v2_model_runner:
        raise refuse(
            "Model Runner V2",
            "it has no inputs for tokens that are computed ahead of a step",
            "Set VLLM_USE_V2_MODEL_RUNNER=0",
        )
    if parallel.pipeline_parallel_size > 1:
        raise refuse(
            "pipeline parallelism",
            "tokens computed ahead go through all layers at once",
            "Use --tensor-parallel-size",
        )
    if parallel.data_parallel_size > 1:
        raise refuse(
            "data parallelism",
            "ranks run their forward passes together, and only some would compute tokens ahead",
            "Start several servers",
        )
    if vllm_config.lora_config is not None:
        raise refuse("LoRA", "adapters are chosen for the tokens of a step only", "Drop --enable-lora")
    if model.is_multimodal_model or model.enable_prompt_embeds or model.uses_mrope:
        raise refuse(
            "multimodal models and prompt embeddings",
            "their inputs are not token ids, and positions may have several dimensions",
            "Serve a text model",
        )
    if policy.steers:
        raise refuse(
            "steering", "what is computed ahead would not be steered as the answer is", "Drop --kv-steering-vectors"
        )


def _check_cache_dtype(name: str, _refuse: Callable[..., KVPolicyError]) -> None:
    from vllm.platforms import current_platform

    if name in ("auto", "bfloat16", "float16", "float32"):
        return
    remedy = "Use --kv-cache-dtype auto"
    if name not in FP8_CACHES:
        raise _refuse(f"--kv-cache-dtype {name}", "only keys of one scale a layer can be scored", f"{remedy} or fp8")
    if current_platform.is_fp8_fnuz():
        raise _refuse(
            f"--kv-cache-dtype {name} on this GPU", "it stores another float8 (fnuz), which cannot be scored", remedy
        )
    if current_platform.is_cpu():
        import vllm._custom_ops as custom_ops

        if custom_ops.cpu_has_amx_fp8():
            raise _refuse(
                f"--kv-cache-dtype {name} on this CPU", "how vLLM packs pages for AMX-FP8 is not known", remedy
            )


def _is_compiled_ray_graph(parallel: ParallelConfig) -> bool:
    import vllm.envs as envs

    return parallel.distributed_executor_backend == "ray" and not envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND


def _check_steering(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    model = vllm_config.model_config
    refuse = functools.partial(_refuse, flag="--kv-steering-vectors")
    if model.skip_tokenizer_init:
        raise refuse("--skip-tokenizer-init", "thoughts are found by the tokenizer", "Drop --skip-tokenizer-init")
    _check_hooks(vllm_config, refuse, "the coefficients")
    for name, vector in zip(policy.kv_steering_vectors, policy.load_vectors(), strict=True):
        try:
            vector.check_fits(model.get_hidden_size(), model.get_total_num_hidden_layers())
        except KVPolicyError as error:
            raise KVPolicyError(f"kv_steering_vectors: {name}: {error}") from None


def _check_hooks(vllm_config: VllmConfig, refuse: Callable[..., KVPolicyError], content: str) -> None:
    """Refuse what hooks in the model cannot live with; `content` is what their buffers hold."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    if parallel.use_sequence_parallel_moe or parallel.enable_hc_sp:
        raise refuse(
            "sequence parallelism",
            "a rank would hold only part of a step's residual stream",
            "Use --tensor-parallel-size without expert parallelism",
        )
    autotunes = vllm_config.compilation_config.inductor_compile_config.get("max_autotune", False)
    if autotunes and current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
        raise refuse(
            "Inductor's max_autotune on CPUs",
            f"it freezes the buffers that hold {content}",
            "Drop it from the compilation config",
        )


def check_kv_cache(kv_cache_config: KVCacheConfig, policy: KVPolicyConfig) -> None:
    """Refuse cache layouts other than one group of full-attention layers, each with a key and a value a token.

    Raises:
        KVPolicyError: naming the specs found, or what is different about them.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    refuse = functools.partial(_refuse, flag="--kv-policy" if policy.evicts else "--kv-steering-vectors")
    if len(specs) != 1 or type(specs[0]) is not FullAttentionSpec:
        found = ", ".join(type(spec).__name__ for spec in specs) or "none"
        raise refuse(f"this model's KV cache ({found})", "it must be one group of full-attention layers", OTHER_MODEL)
    (spec,) = specs
    # Without its hybrid manager (on CPUs, and for chunked attention anywhere) vLLM calls local layers full ones.
    for name in ("sliding_window", "attention_chunk_size", "non_causal"):
        if value := getattr(spec, name):
            raise refuse(f"attention with {name}={value}", "its mask needs the positions of all tokens", OTHER_MODEL)
    packed = (spec.num_head_slots, spec.state_content_bytes, spec.tokens_per_state) != (None, None, 1)
    if packed or spec.head_size_v != spec.head_size:
        raise refuse(
            f"this model's KV pages (keys of {spec.head_size} and values of {spec.head_size_v}, "
            f"{spec.num_head_slots or spec.num_kv_heads} cells for {spec.num_kv_heads} heads)",
            "a page must hold a key and a value of the same size for every token and head",
            OTHER_MODEL,
        )


def check_attention(impls: Iterable[Any]) -> None:
    """Refuse attention that would not read compacted pages as they are meant.

    Args:
        impls: vLLM's attention implementations, one a layer.

    Raises:
        KVPolicyError: for the first one found.
    """
    for impl in impls:
        if type(impl).__name__ not in BACKENDS:
            raise _refuse(
                f"the attention of {type(impl).__name__}",
                "how it reads pages was not tested",
                f"Use --attention-backend {', '.join(BACKENDS.values())}",
            )
        if impl.alibi_slopes is not None:
            raise _refuse("ALiBi", "its bias counts the tokens between two slots, some of them evicted", OTHER_MODEL)
        if impl.kv_sharing_target_layer_name is not None:
            raise _refuse("layers that share a cache", "each of them would evict other tokens of it", OTHER_MODEL)
