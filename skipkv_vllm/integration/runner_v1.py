"""Adapter for vLLM's Model Runner V1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..worker.batch import StepBatch
from ..worker.runtime import EvictionRuntime
from ..worker.signals.base import ForwardOutput
from . import compat
from .build import bind_cache, build_runtime, profile_compactions
from .resident import ResidentLengths, replaced

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object


class EvictingRunnerV1(_Base):
    """Resident lengths for the KV cache, logical lengths for everything else."""

    runtime: EvictionRuntime
    _begun: Any = None
    """the step whose orders were carried out before `execute_model`"""

    def build_runtime(self) -> None:
        """Allocate the runtime. The worker calls this once the model is loaded."""
        self.runtime = build_runtime(self.vllm_config, self.get_model(), self.device)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        self._group = compat.cache_groups(self.vllm_config, kv_cache_config.kv_cache_groups).evicting
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if not kwargs.get("is_profiling", bool(args and args[0])):
            bind_cache(self, kv_cache_config, lambda request_id: self.requests[request_id].prompt_token_ids)

    def _evicting_table(self) -> Any:
        """Return the block table of the group that is compacted."""
        return self.input_batch.block_table[self._group]

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        profile_compactions(self.vllm_config, self.device)

    def begin_step(self, scheduler_output: Any) -> None:
        """Carry out a step's orders. `execute_model` does so unless it was done before."""
        self._begun = scheduler_output
        orders = compat.received_orders(scheduler_output)
        # Before the step zeroes or writes any block, because blocks freed by a compaction may be reused in it.
        self.runtime.begin_step(orders, scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        for order in orders.compactions if orders else ():
            blocks, state = list(order.target_blocks), self.requests[order.request_id]
            state.block_ids = replaced(state.block_ids, self._group, blocks)
            row = self.input_batch.req_id_to_index.get(order.request_id)
            if row is not None:
                self._evicting_table().add_row(blocks, row)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output is not self._begun:
            self.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        state, slots = self.execute_model_state, self._evicting_table().slot_mapping.gpu
        produced = (None, None) if state is None else (state.hidden_states, lambda: state.logits)
        self.runtime.finish_forward(ForwardOutput(self.input_ids.gpu, slots, *produced))
        return output

    def num_evicted_tokens(self, num_scheduled_tokens: np.ndarray) -> np.ndarray | None:
        """Get ready for the forward pass.

        Returns:
            int32 `[R]`, tokens that each request no longer holds; None if no request has evicted any.
        """
        batch = self._step_batch(num_scheduled_tokens, int(num_scheduled_tokens.sum()))
        evicted = self.runtime.prepare(batch)
        self.runtime.steer(batch, self.input_ids.gpu)
        return None if evicted is None else evicted.host

    def _step_batch(self, num_scheduled_tokens: np.ndarray, num_tokens: int) -> StepBatch:
        n = self.input_batch.num_reqs
        starts = self.input_batch.num_computed_tokens_cpu[:n]
        return StepBatch(self.input_batch.req_ids[:n], num_scheduled_tokens, starts, num_tokens)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self.runtime.prepare_dummy()
        return super()._dummy_run(*args, **kwargs)


class OnHost(NamedTuple):
    """The runner's buffers as NumPy arrays, if the device is the CPU.

    For the few numbers of a step NumPy takes a third of PyTorch's time, and a tenth of the time of vLLM's slot mapping,
    which starts threads.
    """

    positions: np.ndarray
    blocks: np.ndarray
    slots: np.ndarray


class HookedRunnerV1(EvictingRunnerV1):
    """The same for a vLLM that does not call `num_evicted_tokens` (`patches/0005`), and for several cache groups."""

    _on_host: OnHost | None = None

    def build_runtime(self) -> None:
        super().build_runtime()
        self._resident = ResidentLengths(self.max_num_reqs, self.device)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        # vLLM may have replaced the block table and the attention groups together with the cache, so they are hooked
        # here.
        table = self._evicting_table()
        if table.compute_slot_mapping == self._map_slots:
            return
        self._resident.attach(self.attn_groups[self._group])
        self._stock_map_slots, table.compute_slot_mapping = table.compute_slot_mapping, self._map_slots
        if self.device.type == "cpu":
            self._block_size = table.block_size
            on_host = (self.positions, table.block_table.gpu, table.slot_mapping.gpu)
            self._on_host = OnHost(*(tensor.numpy() for tensor in on_host))
        else:
            self._slot_positions = torch.zeros_like(self.positions)

    def num_evicted_tokens(self, num_scheduled_tokens: np.ndarray) -> None:
        """Leave lengths and slots to the hooks."""

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        batch = self._step_batch(num_scheduled_tokens, scheduler_output.total_num_scheduled_tokens)
        self._resident.evicted = self.runtime.prepare(batch)
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self.runtime.steer(batch, self.input_ids.gpu)
        return prepared

    def _map_slots(self, num_reqs: int, query_start_loc: Tensor, positions: Tensor) -> None:
        """Replace the block table's `compute_slot_mapping`: slots follow from resident positions."""
        if self._on_host is not None:
            self._map_slots_on_host(self._on_host, positions.shape[0])
            return
        if self._resident.evicted is not None:
            total = positions.shape[0]
            offset = self._resident.evicted.device
            if total > num_reqs:
                offset = offset[self.req_indices.gpu[:total].long()]
            positions = torch.sub(positions, offset, out=self._slot_positions[:total])
        self._stock_map_slots(num_reqs, query_start_loc, positions)

    def _map_slots_on_host(self, host: OnHost, num_tokens: int) -> None:
        rows, positions = self.req_indices.np[:num_tokens], host.positions[:num_tokens]
        if self._resident.evicted is not None:
            positions = positions - self._resident.evicted.host[rows]
        block, within = np.divmod(positions, self._block_size)
        np.add(host.blocks[rows, block].astype(np.int64) * self._block_size, within, out=host.slots[:num_tokens])

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self._resident.evicted = None
        return super()._dummy_run(*args, **kwargs)
