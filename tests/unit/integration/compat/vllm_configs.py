"""Configurations of vLLM for tests, without a model."""

from __future__ import annotations

from types import SimpleNamespace


def make_vllm_config(**changes) -> SimpleNamespace:
    """Return a plain decoder-only model with all optional features off."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            use_mla=False,
            is_hybrid=False,
            is_attention_free=False,
            is_mm_prefix_lm=False,
            get_sliding_window=lambda: None,
            skip_tokenizer_init=False,
            is_multimodal_model=False,
            enable_prompt_embeds=False,
            uses_mrope=False,
            hf_text_config=SimpleNamespace(),
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            data_parallel_size=1,
            distributed_executor_backend="mp",
            enable_dbo=False,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_match_unit=None),
        diffusion_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        use_v2_model_runner=False,
        additional_config=None,
        max_in_flight_tokens=0,
        max_concurrent_batches=1,
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        assert hasattr(target, name)
        setattr(target, name, value)
    return config
