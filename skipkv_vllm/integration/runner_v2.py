"""Adapter for vLLM's Model Runner V2."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core.device import to_device
from ..core.needs import Need
from ..worker.batch import Evicted, StepBatch
from ..worker.runtime import EvictionRuntime
from ..worker.signals.base import ForwardOutput
from . import compat
from .build import bind_cache, build_runtime, profile_compactions
from .drafters import ResidentTables
from .resident import ResidentLengths

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:
    _Base = object


class EvictingRunnerV2(_Base):
    """Resident lengths for the KV cache, logical lengths for everything else.

    `input_batch.seq_lens` stays logical, because sampling reads it.
    """

    evicts_kv_tokens = True  # read by vLLM where it has `num_evicted_tokens`
    runtime: EvictionRuntime
    _begun: Any = None
    """the step whose orders were carried out before `execute_model`"""

    def build_runtime(self) -> None:
        """Allocate the runtime. The worker calls this once the model is loaded."""
        self.runtime = build_runtime(self.vllm_config, self.get_model(), self.device)
        self._questions: dict[str, list[int]] = {}

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        self._group = compat.cache_groups(self.vllm_config, kv_cache_config.kv_cache_groups).evicting
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if not kwargs.get("is_profiling", bool(args and args[0])):
            bind_cache(self, kv_cache_config, self._questions.__getitem__)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        super().profile_run(*args, **kwargs)
        profile_compactions(self.vllm_config, self.device)

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(scheduler_output)
        config = self.runtime.config
        if config.needs & Need.LOOKAHEAD:
            # The runner keeps prompts on the device only. A question is at most the window.
            for new in scheduler_output.scheduled_new_reqs:
                self._questions[new.req_id] = (new.prompt_token_ids or [])[-config.kv_window :]

    def begin_step(self, scheduler_output: Any) -> None:
        """Carry out a step's orders. `execute_model` does so unless it was done before."""
        self._begun = scheduler_output
        for request_id in scheduler_output.finished_req_ids:
            self._questions.pop(request_id, None)
        orders = compat.received_orders(scheduler_output)
        # Before the step zeroes or writes any block, because blocks freed by a compaction may be reused in it.
        self.runtime.begin_step(orders, scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or ())
        for order in orders.compactions if orders else ():
            row, tables = self.req_states.req_id_to_index[order.request_id], self.block_tables
            tables.block_tables[self._group].stage_write(row, 0, list(order.target_blocks))
            tables.num_blocks.np[self._group, row] = len(order.target_blocks)

    def execute_model(self, scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
        if dummy_run:
            self.runtime.prepare_dummy()
            return super().execute_model(scheduler_output, *args, dummy_run=True, **kwargs)
        if scheduler_output is not self._begun:
            self.begin_step(scheduler_output)
        output = super().execute_model(scheduler_output, *args, dummy_run=False, **kwargs)
        state, slots = self.execute_model_state, self.block_tables.slot_mappings[self._group]
        if state is not None:
            self._finish_forward(ForwardOutput(state.input_batch.input_ids, slots, state.hidden_states, self._logits))
        return output

    def _finish_forward(self, output: ForwardOutput) -> None:
        self.runtime.finish_forward(output)

    def _logits(self) -> torch.Tensor:
        """Compute the logits of each request's last token, which this runner does later, when it samples."""
        state = self.execute_model_state
        return self.model.compute_logits(state.hidden_states[state.input_batch.logits_indices])

    def capture_model(self, *args: Any, **kwargs: Any) -> Any:
        # Warm-up ran steps without requests. The graphs must contain what those steps could skip.
        self.runtime.prepare_dummy()
        return super().capture_model(*args, **kwargs)

    def num_evicted_tokens(self, input_batch: Any) -> np.ndarray | None:
        """Get ready for the forward pass.

        Returns:
            int32 `[R]`, tokens that each request no longer holds; None if no request has evicted any.
        """
        evicted = self._prepare(input_batch)
        return None if evicted is None else evicted.host

    def _prepare(self, inputs: Any) -> Evicted | None:
        counts, starts = inputs.num_scheduled_tokens, inputs.num_computed_tokens_np
        positions = None if self.vllm_config.speculative_config is None else inputs.positions
        batch = StepBatch(inputs.req_ids, counts, starts, inputs.num_tokens, positions)
        self.runtime.steer(batch, inputs.input_ids)
        return self.runtime.prepare(batch)


class HookedRunnerV2(EvictingRunnerV2):
    """The same for a vLLM that does not call `num_evicted_tokens` (`patches/0006`), and for several cache groups."""

    evicts_kv_tokens = False
    _resident_slots: torch.Tensor | None = None
    """slots of all groups by resident positions, if there are several groups"""
    _draft_lengths: ResidentLengths | None = None
    """for the attention of a drafter"""
    _unverified: ForwardOutput | None = None
    """of a step whose drafts are not verified yet"""

    def build_runtime(self) -> None:
        super().build_runtime()
        self._resident = ResidentLengths(self.max_num_reqs, self.device)
        self._slot_positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=self.device)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._resident.attach(self.attn_groups[self._group])
        slots = self.block_tables.slot_mappings
        self._resident_slots = torch.zeros_like(slots) if slots.shape[0] > 1 else None
        if compat.draft_layers(self.vllm_config):
            self._attach_drafter(self.speculator)

    def _attach_drafter(self, drafter: Any) -> None:
        lengths = self._draft_lengths = ResidentLengths(self.max_num_reqs, self.device)
        lengths.attach(drafter.attn_groups[self._group])
        # A draft model reads one token more of each request than the model.
        most = self.max_num_tokens + self.max_num_reqs
        drafter.block_tables = ResidentTables(self.block_tables, lengths, most, self.device)
        # Metadata that is updated within a graph would read the runner's logical lengths.
        drafter.supports_decode_metadata_update = False

    def num_evicted_tokens(self, input_batch: Any) -> None:
        """Leave lengths and slots to the hooks."""

    def execute_model(self, scheduler_output: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
        if dummy_run:
            self._set_evicted(None)
        return super().execute_model(scheduler_output, *args, dummy_run=dummy_run, **kwargs)

    def _set_evicted(self, evicted: Evicted | None) -> None:
        self._resident.evicted = evicted
        if self._draft_lengths is not None:
            self._draft_lengths.evicted = evicted

    def _finish_forward(self, output: ForwardOutput) -> None:
        if self.vllm_config.speculative_config is None:
            super()._finish_forward(output)
        else:
            self._unverified = output

    def postprocess_sampled(
        self, idx_mapping: Any, sampled_tokens: Any, num_sampled: Any, num_rejected: Any, *args: Any, **kwargs: Any
    ) -> None:
        output, self._unverified = self._unverified, None
        if output is not None:
            self.runtime.finish_forward(output._replace(num_rejected=num_rejected))
        super().postprocess_sampled(idx_mapping, sampled_tokens, num_sampled, num_rejected, *args, **kwargs)

    def prepare_attn(self, input_batch: Any) -> Any:
        """Compute slot mappings from resident positions where KV is compacted; RoPE keeps `input_batch.positions`."""
        evicted = self._prepare(input_batch)
        self._set_evicted(evicted)
        if evicted is None:
            return super().prepare_attn(input_batch)
        positions = self._slot_positions[: input_batch.positions.shape[0]]
        positions.copy_(input_batch.positions)
        total, by_token = input_batch.num_tokens, evicted.device
        if total > input_batch.num_reqs:
            by_token = to_device(np.repeat(evicted.host, input_batch.num_scheduled_tokens), torch.int64, self.device)
        positions[:total].sub_(by_token)
        if self._resident_slots is None:
            return super().prepare_attn(dataclasses.replace(input_batch, positions=positions))
        tables, slots = super().prepare_attn(input_batch)
        resident = self.block_tables.compute_slot_mappings(
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            positions,
            input_batch.num_tokens_after_padding,
            out=self._resident_slots,
        )
        slots[self._group].copy_(resident[self._group])
        return tables, slots
