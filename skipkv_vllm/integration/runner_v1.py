"""Adapter for vLLM's Model Runner V1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.device import to_device
from ..worker.batch import StepBatch
from ..worker.runtime import EvictionRuntime
from ..worker.signals.base import ForwardOutput
from . import compat
from .build import bind_cache, build_runtime, profile_compactions
from .drafters import ResidentDrafter
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
        self._finish_forward(ForwardOutput(self.input_ids.gpu, slots, *produced))
        return output

    def _finish_forward(self, output: ForwardOutput) -> None:
        self.runtime.finish_forward(output)

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
    _unverified: ForwardOutput | None = None
    """of a step whose drafts are not verified yet"""

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
        if compat.draft_layers(self.vllm_config):
            ResidentDrafter(self.drafter, self._resident)
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
        if self.speculative_config is not None:
            return self._prepare_drafts(scheduler_output, batch)
        self._resident.evicted = self.runtime.prepare(batch)
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self.runtime.steer(batch, self.input_ids.gpu)
        return prepared

    def _prepare_drafts(self, scheduler_output: Any, batch: StepBatch) -> Any:
        """Do the same where the device corrects the positions, if drafts of the last step were rejected."""
        self._resident.evicted = self.runtime.evicted(batch.request_ids)
        prepared = super()._prepare_inputs(scheduler_output, batch.counts)
        batch = batch._replace(positions=self.positions)
        self.runtime.steer(batch, self.input_ids.gpu)
        self.runtime.prepare(batch)
        return prepared

    def _finish_forward(self, output: ForwardOutput) -> None:
        if self.speculative_config is None or self.execute_model_state is None:
            super()._finish_forward(output)
        else:
            self._unverified = output

    def _update_states_after_model_execute(self, output_token_ids: Tensor, scheduler_output: Any) -> None:
        super()._update_states_after_model_execute(output_token_ids, scheduler_output)
        output, self._unverified = self._unverified, None
        if output is None:
            return
        drafts, request_ids = scheduler_output.scheduled_spec_decode_tokens, self.input_batch.req_ids
        counts = np.array([len(drafts.get(request_id, ())) for request_id in request_ids[: self.input_batch.num_reqs]])
        num_drafts = to_device(counts, torch.int64, self.device)
        # Of each request one token more than it has accepted drafts; the others are -1.
        num_accepted = (output_token_ids[: len(counts)] != -1).sum(dim=1) - 1
        num_rejected = torch.where(num_drafts > 0, num_drafts - num_accepted, 0)
        self.runtime.finish_forward(output._replace(num_rejected=num_rejected))

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
