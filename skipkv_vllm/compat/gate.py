"""Version gate and signature check: what we override must look as it did when it was tested."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from ..errors import KVPolicyError

SUPPORTED_VLLM = "0.32"

# Private methods that this package overrides or calls, with the parameters it relies on.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.get_num_blocks_to_allocate": (
        "self",
        "request_id",
        "num_tokens",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.allocate_new_blocks": (
        "self",
        "request_id",
        "num_tokens",
        "num_tokens_main_model",
    ),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": ("self", "request", "num_tokens"),
    "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.pop_blocks_for_free": ("self", "request_id"),
    "vllm.v1.core.block_pool:BlockPool.free_blocks": ("self", "ordered_blocks"),
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": ("self", "num_blocks"),
    "vllm.v1.core.block_pool:BlockPool.evict_blocks": ("self", "block_ids"),
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": ("self", "throttle_prefills"),
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": ("self", "request", "timestamp"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.make_stats": ("self",),
    "vllm.v1.engine.input_processor:InputProcessor._validate_params": ("self", "params", "supported_tasks"),
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": ("parser",),
    "vllm.engine.arg_utils:EngineArgs.from_cli_args": ("cls", "args"),
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": ("self",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run": ("self", "num_tokens"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache": ("self", "kv_cache_config"),
}


def check_version() -> None:
    """Refuse a vLLM this package was not tested with.

    Raises:
        KVPolicyError: naming both versions and the remedy.
    """
    import vllm

    if ".".join(vllm.__version__.split(".")[:2]) != SUPPORTED_VLLM:
        raise KVPolicyError(
            f"skipkv-vllm supports vLLM {SUPPORTED_VLLM}.x and found {vllm.__version__}; "
            f"run `pip install 'vllm=={SUPPORTED_VLLM}.*'`, install a skipkv-vllm release made for your vLLM, "
            "or start without --kv-policy"
        )


@functools.cache
def check_signatures() -> None:
    """Compare the methods this package overrides with what it expects.

    Raises:
        KVPolicyError: listing every method that is missing or has other leading parameters.
    """
    wrong = []
    for target, expected in SIGNATURES.items():
        module_name, _, path = target.partition(":")
        try:
            found: Any = functools.reduce(getattr, path.split("."), importlib.import_module(module_name))
            parameters = tuple(inspect.signature(inspect.unwrap(getattr(found, "__func__", found))).parameters)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{path} ({error})")
            continue
        if parameters[: len(expected)] != expected:
            wrong.append(f"{path}{parameters[: len(expected)]} instead of {expected}")
    if wrong:
        raise KVPolicyError(
            f"this vLLM {SUPPORTED_VLLM} differs from the one skipkv-vllm was tested with: {'; '.join(wrong)}. "
            f"Reinstall an unpatched vLLM {SUPPORTED_VLLM}.x, or start without --kv-policy"
        )
