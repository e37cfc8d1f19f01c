"""Everything of vLLM that this package overrides, wraps, calls or reads beyond its public interface, by symbol.

`record` writes the hash of each of these symbols, and the version check compares them.
"""

from __future__ import annotations

DRAFTER_V1 = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
DRAFTER_V2 = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
RUNNER_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
RUNNER_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"

POOL_CHECK = {
    "0.32": "vllm.v1.core.kv_cache_utils:_check_enough_kv_cache_memory",
    "0.33": "vllm.v1.core.kv_cache_planning:_check_enough_kv_cache_memory",
}
POOL_PLANNING = {
    "0.32": "vllm.v1.core.kv_cache_utils:get_kv_cache_configs",
    "0.33": "vllm.v1.core.kv_cache_planning:get_kv_cache_configs",
}
POOL_GROUPS = {
    "0.32": "vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
    "0.33": "vllm.v1.core.kv_cache_planning:get_kv_cache_groups",
}
MESSAGE_STREAM = {
    "0.32": "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.message_stream_converter",
    "0.33": "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.chat_completion_stream_generator",
}
CHAT_CHUNKS = {
    "0.32": "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
    "0.33": "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator_raw",
}
MOVED = (POOL_CHECK, POOL_PLANNING, POOL_GROUPS, MESSAGE_STREAM, CHAT_CHUNKS)
"""What has another name in another version of vLLM: first minor version with a name -> the name; see `located`."""

OVERRIDES = {
    "skipkv_vllm.integration.scheduler:EvictionMixin": (
        SCHEDULER,
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    ),
    "skipkv_vllm.integration.block_manager:EvictingBlockManager": (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    ),
    "skipkv_vllm.integration.waiting_queue:PrefillLengthQueue": ("vllm.v1.core.sched.request_queue:RequestQueue",),
    "skipkv_vllm.integration.free_queue:GuardQueue": ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue",),
    "skipkv_vllm.integration.runner_v1:EvictingRunnerV1": (
        RUNNER_V1,
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
    ),
    "skipkv_vllm.integration.runner_v1:HookedRunnerV1": (RUNNER_V1,),
    "skipkv_vllm.integration.runner_v2:EvictingRunnerV2": (RUNNER_V2,),
    "skipkv_vllm.integration.runner_v2:HookedRunnerV2": (RUNNER_V2,),
    "skipkv_vllm.integration.reporting:ReportingRunner": (RUNNER_V1, RUNNER_V2),
    "skipkv_vllm.integration.workers:EvictingWorker": (
        "vllm.v1.worker.gpu_worker:Worker",
        "vllm.v1.worker.cpu_worker:CPUWorker",
    ),
    "skipkv_vllm.integration.cpu_worker:EvictingCPUWorker": ("vllm.v1.worker.cpu_worker:CPUWorker",),
    "skipkv_vllm.integration.metrics:EvictionStatLogger": ("vllm.v1.metrics.loggers:StatLoggerBase",),
    "skipkv_vllm.integration.llm:LLM": ("vllm.entrypoints.llm:LLM",),
}
"""Our classes -> the classes of vLLM whose methods they override; `record` finds the methods by comparing them."""

PRIVATE_NAMES = {
    "_pause_state": (f"{SCHEDULER}.__init__", f"{SCHEDULER}.schedule", f"{SCHEDULER}.set_pause_state"),
    "_maybe_get_memory_pool_context": ("vllm.v1.worker.gpu_worker:Worker._maybe_get_memory_pool_context",),
    "_k_scale": ("vllm.model_executor.layers.attention.attention:set_default_quant_scales",),
    "_update_positions_dependent_metadata": (f"{DRAFTER_V1}._update_positions_dependent_metadata",),
    "_slot_mapping_buffer": (f"{DRAFTER_V1}.__init__", f"{DRAFTER_V1}._update_positions_dependent_metadata"),
    "fake_free_list_head": ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.__init__",),
}
"""Private attributes and methods of vLLM used outside this folder, not counting overridden methods -> the symbols that
define them. `fake_free_list_head` has no underscore, but is an internal of its queue."""

WRAPPED = (
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "vllm.v1.engine.input_processor:InputProcessor.__init__",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.engine.output_processor:RequestState.make_request_output",
    "vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch.chat_completion_full_generator_batch",
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator",
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.request_output_to_completion_response",
    "vllm.entrypoints.openai.responses.context:ParsableContext.append_output",
    "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens_stream_generator",
    "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
    "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
    "vllm.v1.worker.utils:AttentionGroup.build_metadata",
    "vllm.v1.worker.utils:AttentionGroup.build_metadata_for_cudagraph_capture",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks",
)
"""Functions that we wrap or replace on an object."""

RELIED_ON = (
    "vllm.utils.torch_utils:get_accelerator_view_from_cpu_tensor",
    # called, or read in detail
    "vllm.distributed.parallel_state:initialize_model_parallel",
    "vllm.forward_context:set_forward_context",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.create_kv_cache_blocks",
    "vllm.v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator.find_longest_cache_hit",
    "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
    "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager.get_num_skipped_tokens",
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.get_num_blocks_to_allocate",
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.allocate_new_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.remove_skipped_blocks",
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.get_num_skipped_tokens",
    "vllm.v1.core.single_type_kv_cache_manager:MambaManager.cache_blocks",
    "vllm.v1.kv_cache_interface:MambaSpec",
    "vllm.platforms.interface:Platform._align_hybrid_block_size",
    f"{SCHEDULER}._mamba_block_aligned_split",
    "vllm.v1.core.block_pool:BlockPool.free_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
    "vllm.v1.core.block_pool:BlockPool.evict_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock",
    "vllm.v1.core.sched.output:SchedulerOutput",
    "vllm.v1.metrics.stats:SchedulerStats",
    "vllm.v1.worker.block_table:BlockTable.add_row",
    "vllm.v1.worker.block_table:BlockTable.append_row",
    "vllm.v1.worker.block_table:MultiGroupBlockTable.compute_slot_mapping",
    f"{RUNNER_V1}._build_attention_metadata",
    f"{RUNNER_V1}._update_states",
    "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
    "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder",
    "vllm.v1.attention.backend:CommonAttentionMetadata",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
    "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",
    "vllm.v1.worker.gpu.buffer_utils:StagedWriteTensor.stage_write",
    "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
    "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
    "vllm.v1.worker.gpu.input_batch:InputBatch",
    "vllm.v1.worker.gpu.attn_utils:init_attn_backend",
    "vllm.v1.worker.gpu.model_runner:ExecuteModelState",
    f"{RUNNER_V2}.sample",
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
    f"{SCHEDULER}.update_from_output",
    f"{RUNNER_V1}.sample_tokens",
    f"{DRAFTER_V1}.propose",
    f"{DRAFTER_V1}.set_inputs_first_pass",
    f"{DRAFTER_V1}._update_positions_dependent_metadata",
    f"{DRAFTER_V1}.build_per_group_and_layer_attn_metadata",
    f"{DRAFTER_V2}.set_attn",
    f"{DRAFTER_V2}._build_attn_metadata",
    "vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator:TargetDependentARSpeculator._multi_step_decode",
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator.propose",
    # must keep doing what they do
    "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.message_stream_converter",
    "vllm.outputs:RequestOutput.add",
    "vllm.v1.engine.parallel_sampling:ParentRequest.get_outputs",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    f"{SCHEDULER}.reset_prefix_cache",
    "vllm.device_allocator.sleep_mode_backend:CuMemBackend.suspend",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
    "vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl.forward_mqa",
    "vllm.v1.attention.backends.mla.cutlass_mla:CutlassMLAImpl.forward_mqa",
    "vllm.v1.attention.backends.mla.flashattn_mla:FlashAttnMLAImpl.forward_mqa",
    "vllm.v1.attention.backends.mla.flashattn_mla:FlashAttnMLAMetadataBuilder._build_decode",
    "vllm.v1.attention.backends.mla.flashinfer_mla:FlashInferMLAImpl.forward_mqa",
    "vllm.v1.attention.backends.mla.flashinfer_mla:FlashInferMLAMetadataBuilder._build_decode",
    "vllm.v1.attention.backends.mla.flashmla:FlashMLAImpl.forward_mqa",
    "vllm.v1.attention.backends.mla.flashmla:FlashMLAMetadataBuilder._build_decode",
    "vllm.v1.attention.backends.mla.triton_mla:TritonMLAImpl.forward_mqa",
    "vllm.model_executor.layers.attention.mla_attention:MLAAttention.forward_impl",
    "vllm.model_executor.layers.attention.mla_attention:MLACommonMetadataBuilder.build",
)
"""Functions and classes that we call, read or depend on where no subclass shows it."""

TESTS = {
    "vllm.": ("tests/engine/test_exactness.py",),
    "vllm.device_allocator.": ("tests/gpu/test_engine_cuda.py", "tests/engine/test_sleep.py"),
    "vllm.distributed.": ("tests/engine/test_parallel.py",),
    "vllm.engine.": ("tests/engine/test_server.py", "tests/unit/config"),
    "vllm.entrypoints.": ("tests/engine/test_server.py", "tests/engine/test_serving.py"),
    "vllm.entrypoints.llm": ("tests/engine/test_full_equals_stock.py",),
    "vllm.forward_context": ("tests/engine/test_prompt_methods.py",),
    "vllm.outputs": ("tests/engine/test_serving.py",),
    "vllm.v1.attention.": ("tests/engine/test_exactness.py", "tests/gpu/test_engine_cuda.py"),
    "vllm.v1.core.": ("tests/engine/test_exactness.py", "tests/engine/test_combinations.py", "tests/unit/scheduler"),
    "vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue": ("tests/unit/integration",),
    "vllm.v1.core.sched.request_queue": ("tests/engine/test_grouping.py",),
    "vllm.v1.engine.": ("tests/engine/test_server.py", "tests/engine/test_serving.py"),
    "vllm.v1.metrics.": ("tests/engine/test_server.py", "tests/unit/integration"),
    "vllm.v1.worker.": ("tests/engine/test_exactness.py", "tests/engine/test_combinations.py"),
}
"""Beginning of a symbol's name -> tests of what we do with it; the longest beginning counts."""
