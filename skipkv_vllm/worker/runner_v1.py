"""Adapter for vLLM's Model Runner V1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..ops.paging import to_device
from ..scheduler.messages import OUTPUT_FIELD
from .build import bind_cache, build_runtime
from .runtime import EvictionRuntime, StepBatch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object


class EvictingRunnerV1(_Base):
    """Physical lengths for the KV cache, logical lengths for everything else."""

    runtime: EvictionRuntime

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.runtime = build_runtime(self.vllm_config, self.get_model(), self.device)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if not kwargs.get("is_profiling", bool(args and args[0])):
            bind_cache(self.runtime, self.vllm_config, kv_cache_config)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        orders = getattr(scheduler_output, OUTPUT_FIELD, None)
        # Before the step zeroes or writes any page: pages freed by a compaction may be reused in it.
        self.runtime.begin_step(orders, scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        for order in orders.compactions if orders else ():
            blocks = (list(order.target_pages),)
            self.requests[order.request_id].block_ids = blocks
            row = self.input_batch.req_id_to_index.get(order.request_id)
            if row is not None:
                self.input_batch.block_table.add_row(blocks, row)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if self.execute_model_state is not None:
            self.runtime.finish_forward(self.input_ids.gpu, self.execute_model_state.hidden_states)
        return output

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        n = self.input_batch.num_reqs
        starts = self.input_batch.num_computed_tokens_cpu[:n].astype(np.int64)
        counts = num_scheduled_tokens.astype(np.int64)
        batch = StepBatch(self.input_batch.req_ids[:n], counts, starts)
        if self.runtime.steering is not None:
            self.runtime.steering.prepare(batch, self.input_ids.gpu)
        evicted = self.runtime.prepare(batch)
        if evicted is not None:
            # After super(): until here vLLM compares these lengths with logical ones.
            offset = to_device(evicted, torch.int32, self.device)
            self.seq_lens[:n] -= offset
            self.optimistic_seq_lens_cpu[:n] -= torch.from_numpy(evicted)
            total = scheduler_output.total_num_scheduled_tokens
            if total > n:  # not one token a request, as in pure decoding
                offset = offset[self.req_indices.gpu[:total].long()]
            slots = self.positions[:total] - offset
            self.input_batch.block_table.compute_slot_mapping(n, self.query_start_loc.gpu[: n + 1], slots)
        return prepared

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self.runtime.prepare_dummy()
        return super()._dummy_run(*args, **kwargs)
