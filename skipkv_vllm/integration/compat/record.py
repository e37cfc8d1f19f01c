"""Write down what vLLM looks like, after the tests have passed with it.

It takes the installed vLLM and the copy that `patches/apply.py` made:

    python -m skipkv_vllm.integration.compat.record --patched build/patched-vllm/vllm
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from . import sources, version
from .public import SEAMS

OVERRIDES = {
    "skipkv_vllm.integration.scheduler:EvictionMixin": (
        "vllm.v1.core.sched.scheduler:Scheduler",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
    ),
    "skipkv_vllm.integration.block_manager:EvictingBlockManager": (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    ),
    "skipkv_vllm.integration.waiting_queue:PrefillLengthQueue": ("vllm.v1.core.sched.request_queue:RequestQueue",),
    "skipkv_vllm.integration.runner_v1:EvictingRunnerV1": (
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
    ),
    "skipkv_vllm.integration.runner_v1:HookedRunnerV1": ("vllm.v1.worker.gpu_model_runner:GPUModelRunner",),
    "skipkv_vllm.integration.runner_v2:EvictingRunnerV2": ("vllm.v1.worker.gpu.model_runner:GPUModelRunner",),
    "skipkv_vllm.integration.runner_v2:HookedRunnerV2": ("vllm.v1.worker.gpu.model_runner:GPUModelRunner",),
    "skipkv_vllm.integration.cpu_worker:EvictingCPUWorker": ("vllm.v1.worker.cpu_worker:CPUWorker",),
    "skipkv_vllm.integration.gpu_worker:EvictingGPUWorker": ("vllm.v1.worker.gpu_worker:Worker",),
    "skipkv_vllm.integration.workers:EvictingWorker": ("vllm.v1.worker.gpu_worker:Worker",),
    "skipkv_vllm.integration.metrics:EvictionStatLogger": ("vllm.v1.metrics.loggers:StatLoggerBase",),
    "skipkv_vllm.integration.llm:LLM": ("vllm.entrypoints.llm:LLM",),
}
"""Our classes and those of vLLM whose methods they override; the methods are found by comparing the classes."""

WRAPPED_OR_CALLED = (
    "vllm.engine.arg_utils:EngineArgs.add_cli_args",
    "vllm.engine.arg_utils:EngineArgs.from_cli_args",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "vllm.v1.engine.input_processor:InputProcessor.__init__",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.engine.output_processor:RequestState.make_request_output",
    "vllm.v1.engine.parallel_sampling:ParentRequest.get_outputs",
    "vllm.outputs:RequestOutput.add",
    "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.message_stream_converter",
    "vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch.chat_completion_full_generator_batch",
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator",
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.request_output_to_completion_response",
    "vllm.entrypoints.openai.responses.context:ParsableContext.append_output",
    "vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens.serve_tokens_stream_generator",
    "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
    "vllm.v1.core.kv_cache_utils:_check_enough_kv_cache_memory",
    "vllm.v1.core.kv_cache_utils:get_kv_cache_configs",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.truncate_computed_blocks",
    "vllm.distributed.parallel_state:initialize_model_parallel",
    "vllm.forward_context:set_forward_context",
    "vllm.v1.core.sched.output:SchedulerOutput",
    "vllm.v1.metrics.stats:SchedulerStats",
    "vllm.v1.core.block_pool:BlockPool.free_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks",
    "vllm.v1.core.block_pool:BlockPool.evict_blocks",
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks",
    "vllm.v1.core.kv_cache_utils:KVCacheBlock",
    "vllm.v1.worker.block_table:BlockTable.add_row",
    "vllm.v1.worker.block_table:BlockTable.append_row",
    "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
    "vllm.v1.worker.block_table:MultiGroupBlockTable.add_row",
    "vllm.v1.worker.block_table:MultiGroupBlockTable.compute_slot_mapping",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
    "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
    "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder",
    "vllm.v1.attention.backend:CommonAttentionMetadata",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
    "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",
    "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
    "vllm.v1.worker.gpu.input_batch:InputBatch",
    "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn",
    "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
    "vllm.v1.worker.gpu_worker:Worker._maybe_get_memory_pool_context",
    "vllm.device_allocator.sleep_mode_backend:CuMemBackend.suspend",
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
    "vllm.v1.attention.backends.flashinfer:FlashInferImpl.forward",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
)
"""What we wrap, and what we call or rely on where no subclass shows it."""


def symbol_names() -> list[str]:
    """Every symbol to watch, sorted; imports our modules and vLLM's."""
    names = set(WRAPPED_OR_CALLED) | {seam.marker for seam in SEAMS.values() if _is_callable(seam.marker)}
    for own_name, base_names in OVERRIDES.items():
        own = _load(own_name)
        for base in map(_load, base_names):
            names |= {found for attribute in vars(own) if (found := _definition(base, attribute))}
    return sorted(names)


def _load(name: str) -> Any:
    module, _, path = name.partition(":")
    return getattr(importlib.import_module(module), path)


def _is_callable(marker: str) -> bool:
    # Fields of classes are watched with their classes, and lists by what reads them.
    return not marker.endswith((".extra", ".request_validators", ":kv_cache_memory_checks"))


def _definition(base: type, attribute: str) -> str | None:
    """The vLLM method that an attribute of a subclass of `base` overrides."""
    for cls in base.__mro__:
        if attribute in vars(cls) and cls.__module__.startswith(f"{sources.PACKAGE}."):
            if callable(getattr(cls, attribute)) and not isinstance(vars(cls)[attribute], type):
                return f"{cls.__module__}:{cls.__qualname__}.{attribute}"
            return None
    return None


def record(names: list[str], roots: list[Path], version: str) -> dict[str, Any]:
    """The record of some symbols.

    Args:
        names: of symbols.
        roots: folders of variants of the package `vllm`, the stock one first.
        version: of the package.

    Raises:
        LookupError: a symbol that no variant defines.
    """
    files: dict[str, list[str | None]] = {}
    entries: dict[str, list[list[str] | None]] = {}
    for root in roots:
        defined: dict[str, dict[str, sources.Symbol]] = {}
        for name in names:
            file, path = sources.split(name)
            if file not in defined:
                text = sources.read(root, file)
                defined[file] = sources.symbols(text) if text is not None else {}
                _add(files.setdefault(file, []), sources.digest(text) if text is not None else None)
            symbol = defined[file].get(path)
            _add(entries.setdefault(name, []), list(symbol) if symbol else None)
    missing = [name for name, variants in entries.items() if not any(variants)]
    if missing:
        raise LookupError(f"not defined in {', '.join(map(str, roots))}: {', '.join(missing)}")
    return {"vllm": version, "files": files, "symbols": entries}


def _add(variants: list[Any], variant: Any) -> None:
    if variant not in variants:
        variants.append(variant)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Required, because a record without them would refuse patched copies.
    parser.add_argument("--patched", type=Path, metavar="FOLDER", required=True, help="vllm with all patches applied")
    options = parser.parse_args()
    if not (options.patched / "__init__.py").exists():
        parser.error(f"--patched {options.patched} is no package; make it with patches/apply.py")
    root = version.vllm_root()
    import vllm

    written = record(symbol_names(), [root, options.patched], vllm.__version__.partition("+")[0])
    version.TESTED.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{version.TESTED}: {len(written['symbols'])} symbols of {len(written['files'])} files of {root}")


if __name__ == "__main__":
    main()
