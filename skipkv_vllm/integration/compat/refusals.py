"""Refuse at start-up what a KV policy does not support; each error names the feature, the reason and the remedy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ...capacity import STATE_MODELS, groups_of, unread_latents
from ...core.errors import KVPolicyError
from ...core.needs import Need
from ...ops.paging import FP8_CACHES, MAX_HEAD_SIZE, ROTATED
from .heads import total_kv_heads

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

    from ...config import KVPolicyConfig


BACKENDS = {
    "FlashAttentionImpl": "FLASH_ATTN",
    "FlashInferImpl": "FLASHINFER",
    "TritonAttentionImpl": "TRITON_ATTN",
    "CPUAttentionBackendImpl": "CPU_ATTN",
}
"""Attention implementations that read compacted blocks rightly -> their names on the command line."""
LATENT_BACKENDS = {
    "CPUMLAImpl": "CPU_MLA",
    "TritonMLAImpl": "TRITON_MLA",
    "FlashMLAImpl": "FLASHMLA",
    "FlashAttnMLAImpl": "FLASH_ATTN_MLA",
    "FlashInferMLAImpl": "FLASHINFER_MLA",
    "CutlassMLAImpl": "CUTLASS_MLA",
}
"""The same for latents (MLA)."""
PLAIN_CACHES = ("auto", "bfloat16", "float16", "float32")
"""`--kv-cache-dtype` of caches that hold numbers as the model computes them."""
OTHER_MODEL = "Serve a decoder-only model with plain attention (Qwen2, Qwen3, Llama, ...)"


Refuse = Callable[..., KVPolicyError]
"""`refusal` for a flag."""


def refusal(feature: str, reason: str, remedy: str, flag: str = "--kv-policy") -> KVPolicyError:
    """Return the error that refuses a feature."""
    return KVPolicyError(f"{flag} does not support {feature}: {reason}. {remedy}, or start without {flag}")


def check_config(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    """Refuse models and features with which eviction or steering would give silently wrong outputs.

    Raises:
        KVPolicyError: for the first one found.
    """
    if policy.kv_prefix_eviction != "lru" and not vllm_config.cache_config.enable_prefix_caching:
        raise KVPolicyError(
            f"kv_prefix_eviction={policy.kv_prefix_eviction!r} has no effect without prefix caching; remove "
            "--kv-prefix-eviction or --no-enable-prefix-caching"
        )
    if policy.evicts:
        _check(vllm_config, policy, refusal)
    if policy.needs & Need.LOOKAHEAD:
        _check_lookahead(vllm_config, policy)
    if policy.recalls:
        _check_recall(vllm_config)
    if policy.steers:
        _check(vllm_config, policy, functools.partial(refusal, flag="--kv-steering-vectors"))
        _check_steering(vllm_config, policy)


def _check(vllm_config: VllmConfig, policy: KVPolicyConfig, refuse: Refuse) -> None:
    _check_model(vllm_config, refuse)
    _check_features(vllm_config, refuse)
    if policy.evicts:
        _check_cache_dtype(vllm_config.cache_config.cache_dtype, refuse)
    model = vllm_config.model_config
    for each in policy.policies:
        chosen = each.segment_options.layers if each.needs & Need.SEGMENTS else ()
        if chosen and chosen[-1] >= (num_layers := model.get_total_num_hidden_layers()):
            raise KVPolicyError(
                f"kv_policy={each.name!r}: layers={','.join(map(str, chosen))!r}, but this model has layers 0 to "
                f"{num_layers - 1}; name some of these in kv_policy_config, or write 'all'"
            )
    if policy.gates is not None:
        for_gates = functools.partial(refusal, flag=f"--kv-policy {policy.kv_policy}")
        _check_hooks(vllm_config, for_gates, "the gates' outputs")
        policy.gates.check_fits(
            hidden_size=model.get_hidden_size(),
            num_layers=model.get_total_num_hidden_layers(),
            num_kv_heads=total_kv_heads(model),
        )
    if policy.needs & Need.SENTENCES and model.skip_tokenizer_init:
        raise refuse(
            "--skip-tokenizer-init",
            f"{policy.kv_policy!r} with granularity {policy.kv_granularity!r} needs the tokenizer to find sentences",
            "Drop --skip-tokenizer-init",
        )


def _check_model(vllm_config: VllmConfig, refuse: Refuse) -> None:
    model = vllm_config.model_config
    if model.runner_type != "generate":
        raise refuse(f"the {model.runner_type!r} runner", "only generation grows a KV cache", "Drop --runner")
    if model.is_encoder_decoder:
        raise refuse("encoder-decoder models", "cross attention has its own cache", OTHER_MODEL)
    if model.use_mla:
        _check_latents(vllm_config, refuse)
    if model.is_attention_free:
        raise refuse("state-space models without attention", "their cache does not grow with the text", OTHER_MODEL)
    if model.is_hybrid:
        _check_states(vllm_config, refuse)
    if vllm_config.diffusion_config is not None:
        raise refuse("diffusion models", "they rewrite tokens, and vLLM schedules them differently", OTHER_MODEL)
    if model.is_mm_prefix_lm:
        raise refuse(
            "prefix-LM attention",
            "the mask of an image's tokens needs the positions of all tokens",
            "Serve text only with --language-model-only",
        )


def _check_latents(vllm_config: VllmConfig, refuse: Refuse) -> None:
    """Refuse models with latents (MLA) whose attention is sparse by itself, and those that no operator reads."""
    from vllm.platforms import current_platform

    text_config = vllm_config.model_config.hf_text_config
    if hasattr(text_config, "index_topk"):
        raise refuse(
            "native sparse attention",
            "an indexer with a cache of its own chooses the tokens that are read",
            "For less GPU memory use vLLM's HiSparse, which moves such a cache to the host",
        )
    if text_config.qk_rope_head_dim != ROTATED:
        raise refuse(
            f"latents (MLA) with {text_config.qk_rope_head_dim} rotated features",
            f"its operators read those with {ROTATED}",
            OTHER_MODEL,
        )
    if (dtype := vllm_config.cache_config.cache_dtype) not in PLAIN_CACHES:
        raise refuse(
            f"--kv-cache-dtype {dtype} of latents (MLA)",
            "kernels differ in how they pack and scale such latents",
            "Use --kv-cache-dtype auto",
        )
    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise refuse(
            "latents (MLA) on GPUs other than NVIDIA's",
            "vLLM may keep the matrices that queries are absorbed with in another form there",
            OTHER_MODEL,
        )
    if found := unread_latents(text_config):
        raise refuse(found, "no kernel reads them", OTHER_MODEL)


def _check_states(vllm_config: VllmConfig, refuse: Refuse) -> None:
    """Refuse models with a state in some layers that were not tested, and hits of the prefix cache within a block."""
    text_config, cache = vllm_config.model_config.hf_text_config, vllm_config.cache_config
    if text_config.model_type not in STATE_MODELS:
        raise refuse(
            f"hybrid models of the type {text_config.model_type!r}, which keep a state in some layers",
            f"of such models only {', '.join(STATE_MODELS)} are supported; others were not tested",
            OTHER_MODEL,
        )
    if cache.prefix_match_unit is not None:
        raise refuse(
            f"--prefix-match-unit {cache.prefix_match_unit} of models with a state in some layers",
            "hits within a block were not tested",
            "Drop --prefix-match-unit",
        )


def _check_features(vllm_config: VllmConfig, refuse: Refuse) -> None:
    import vllm.envs as envs

    parallel = vllm_config.parallel_config
    if vllm_config.kv_transfer_config is not None:
        raise refuse(
            "KV connectors",
            "they identify blocks by token position, which eviction changes",
            "Drop --kv-transfer-config and --kv-offloading-size",
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise refuse(
            "context parallelism",
            "a request's blocks are spread over ranks",
            "Set --decode-context-parallel-size and --prefill-context-parallel-size to 1",
        )
    if parallel.pipeline_parallel_size > 1 and groups_of(vllm_config.model_config.hf_text_config, 1).num_others:
        raise refuse(
            "pipeline parallelism of models with a sliding window or a state in some layers",
            "vLLM groups the layers of all stages together, and a stage sees its own only",
            "Use --tensor-parallel-size",
        )
    if parallel.pipeline_parallel_size > 1 and _is_compiled_ray_graph(parallel):
        raise refuse(
            "pipeline parallelism on Ray's compiled graphs (VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0)",
            "a stage starts only when it gets the previous one's output, but stages must exchange data before that",
            "Unset VLLM_USE_RAY_V2_EXECUTOR_BACKEND",
        )
    if envs.VLLM_USE_RUST_FRONTEND:
        raise refuse(
            "vLLM's front end in Rust (VLLM_USE_RUST_FRONTEND=1)",
            "it sends requests to the engine without checking their options",
            "Unset VLLM_USE_RUST_FRONTEND",
        )
    if parallel.enable_dbo:
        raise refuse("dual-batch overlap", "micro-batches see only part of a step", "Drop --enable-dbo")


def _check_recall(vllm_config: VllmConfig) -> None:
    refuse = functools.partial(refusal, flag="--kv-recall-memory")
    if vllm_config.model_config.use_mla:
        raise refuse("latents (MLA)", "it sketches keys of attention heads only", OTHER_MODEL)


def _check_lookahead(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    names = [each.name for each in policy.policies if each.lookahead_plan is not None]
    flag = f"--kv-request-policies {' '.join(names)}"
    if policy.policy.lookahead_plan is not None:
        flag = f"--kv-policy {policy.kv_policy}"
    refuse = functools.partial(refusal, flag=flag)
    if parallel.pipeline_parallel_size > 1:
        raise refuse(
            "pipeline parallelism",
            "tokens computed ahead pass through all layers at once",
            "Use --tensor-parallel-size",
        )
    if parallel.data_parallel_size > 1:
        raise refuse(
            "data parallelism",
            "ranks run their forward passes together, but only some would compute tokens ahead",
            "Start several servers",
        )
    if vllm_config.lora_config is not None:
        raise refuse("LoRA", "adapters are selected only for the tokens of a step", "Drop --enable-lora")
    if model.is_multimodal_model or model.enable_prompt_embeds or model.uses_mrope:
        raise refuse(
            "multimodal models and prompt embeddings",
            "their inputs are not token ids, and positions may have several dimensions",
            "Serve a text model",
        )
    if policy.steers:
        raise refuse(
            "steering", "tokens computed ahead would not be steered as the answer is", "Drop --kv-steering-vectors"
        )


def _check_cache_dtype(name: str, refuse: Refuse) -> None:
    from vllm.platforms import current_platform

    if name in PLAIN_CACHES:
        return
    remedy = "Use --kv-cache-dtype auto"
    if name not in FP8_CACHES:
        raise refuse(f"--kv-cache-dtype {name}", "only keys with one scale per layer can be scored", f"{remedy} or fp8")
    if current_platform.is_fp8_fnuz():
        raise refuse(
            f"--kv-cache-dtype {name} on this GPU", "it stores another float8 (fnuz), which cannot be scored", remedy
        )
    if current_platform.is_cpu():
        import vllm._custom_ops as custom_ops

        if custom_ops.cpu_has_amx_fp8():
            raise refuse(
                f"--kv-cache-dtype {name} on this CPU", "how vLLM packs blocks for AMX-FP8 is not known", remedy
            )


def _is_compiled_ray_graph(parallel: ParallelConfig) -> bool:
    import vllm.envs as envs

    # vLLM 0.33 has no other executor than the one that this variable chose.
    return parallel.distributed_executor_backend == "ray" and not getattr(
        envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True
    )


def _check_steering(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    model = vllm_config.model_config
    refuse = functools.partial(refusal, flag="--kv-steering-vectors")
    if model.skip_tokenizer_init:
        raise refuse("--skip-tokenizer-init", "the tokenizer is needed to find thoughts", "Drop --skip-tokenizer-init")
    _check_hooks(vllm_config, refuse, "the coefficients")
    for name, vector in zip(policy.kv_steering_vectors, policy.load_vectors(), strict=True):
        try:
            vector.check_fits(model.get_hidden_size(), model.get_total_num_hidden_layers())
        except KVPolicyError as error:
            raise KVPolicyError(f"kv_steering_vectors: {name}: {error}") from None


def _check_hooks(vllm_config: VllmConfig, refuse: Refuse, content: str) -> None:
    """Refuse features that hooks in the model cannot work with; `content` names what their buffers hold."""
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


def check_attention(impls: Iterable[Any]) -> None:
    """Refuse attention that would misread compacted blocks.

    Args:
        impls: vLLM's attention implementations of the layers whose KV is compacted.

    Raises:
        KVPolicyError: for the first one found.
    """
    from vllm.platforms import current_platform

    for impl in impls:
        name = type(impl).__name__
        known = LATENT_BACKENDS if "MLA" in name else BACKENDS
        if name not in known:
            raise refusal(
                f"the attention of {name}",
                "how it reads blocks is not known",
                f"Use --attention-backend {', '.join(known.values())}",
            )
        if current_platform.is_cuda_alike() and impl.head_size > MAX_HEAD_SIZE and known is BACKENDS:
            raise refusal(
                f"heads of {impl.head_size} on GPUs", f"its kernels take heads of up to {MAX_HEAD_SIZE}", OTHER_MODEL
            )
        if getattr(impl, "alibi_slopes", None) is not None:
            raise refusal("ALiBi", "its bias counts the tokens between two slots, including evicted ones", OTHER_MODEL)
        if getattr(impl, "logits_soft_cap", None):
            raise refusal("attention with a soft cap of its logits", "scores would not be capped", OTHER_MODEL)
        if getattr(impl, "kv_sharing_target_layer_name", None) is not None:
            raise refusal("layers that share a cache", "each layer would evict different tokens", OTHER_MODEL)
