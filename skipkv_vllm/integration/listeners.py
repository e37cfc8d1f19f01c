"""Makes the listeners of a scheduler from vLLM's configuration: they need the tokenizer and the parallel layout."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config

from ..config import KVPolicyConfig
from ..scheduler.listeners import ClientReports, SteeringListener, TraceListener
from ..scheduler.requests import RequestListener
from ..scheduler.stats import EvictionStats
from ..sentences import build_tables
from ..steering.controller import SteeringController
from ..steering.tables import build_thought_tables
from ..trace.collector import TraceCollector


def make_listeners(
    vllm_config: VllmConfig, config: KVPolicyConfig, block_size: int, stats: EvictionStats
) -> list[RequestListener]:
    """Return the listeners of a server, in the order of their calls; `stats` is one of them."""
    listeners: list[RequestListener] = [stats, ClientReports()]
    if config.steers:
        # It sets what the others report.
        listeners.insert(0, SteeringListener(_make_steering(vllm_config, config), config))
    if config.kv_trace_dir:
        listeners.append(TraceListener(_make_trace(vllm_config, config, config.kv_trace_dir, block_size), stats))
    return listeners


def _make_steering(vllm_config: VllmConfig, config: KVPolicyConfig) -> SteeringController:
    model, compat = vllm_config.model_config, config.kv_steering_compat
    tables = build_thought_tables(cached_tokenizer_from_config(model), model.get_vocab_size(), compat)
    return SteeringController(tables, config.kv_steering_interval, compat == "published")


def _make_trace(vllm_config: VllmConfig, config: KVPolicyConfig, folder: str, block_size: int) -> TraceCollector:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    tables = None
    if not model.skip_tokenizer_init:
        tables = build_tables(cached_tokenizer_from_config(model), config.policy.sentence_options.compat)
    parameters = config.model_dump() | {"model": model.model, "page_size": block_size}
    grid = (parallel.pipeline_parallel_size, parallel.tensor_parallel_size)
    return TraceCollector(folder, grid, tables, parameters)
