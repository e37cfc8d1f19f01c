"""Run the model between two steps, to compute tokens ahead: the target model is its own draft model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..core.device import to_device
from ..worker.signals.queries import QueryRing

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1


class LookaheadDecoder:
    """Runs the model of either model runner between two steps, outside CUDA graphs, on tensors of its own.

    Args:
        runner: with its KV cache bound.
        ring: hands out the queries.
        prompt: returns the prompt of a running request, or at least its last `kv_window` tokens.
    """

    def __init__(self, runner: RunnerV1 | RunnerV2, ring: QueryRing, prompt: Callable[[str], Sequence[int]]) -> None:
        self._runner, self._ring, self._prompt = runner, ring, prompt
        self.max_length: int = runner.max_model_len
        self.max_tokens: int = runner.max_num_tokens

    def decode(
        self,
        tokens: Tensor,
        starts: Sequence[int],
        num_held: Sequence[int],
        table: Tensor,
        page_size: int,
        num_tokens: int = 0,
    ) -> Tensor:
        """See `worker.lookahead.Decoder`."""
        hidden, queries = self._read(tokens, starts, num_held, table, page_size)
        every, num_read = [queries], tokens.shape[1]
        for i in range(num_read, num_read + num_tokens - 1):
            following = self._runner.model.compute_logits(hidden).argmax(dim=-1, keepdim=True)
            places = [start + i for start in starts], [held + i for held in num_held]
            hidden, queries = self._read(following, *places, table, page_size)
            every.append(queries)
        return torch.cat(every, dim=2)

    def _read(
        self, tokens: Tensor, starts: Sequence[int], num_held: Sequence[int], table: Tensor, page_size: int
    ) -> tuple[Tensor, Tensor]:
        """Run one forward pass; see `decode`.

        Returns:
            Hidden states of each request's last token `[R, E]`, and queries `[R, layers, n, Hq, D]`.
        """
        runner, device = self._runner, table.device
        num_requests, num_tokens = tokens.shape
        total, order = num_requests * num_tokens, torch.arange(num_tokens, device=device)
        lengths = torch.tensor(num_held, dtype=torch.int32) + num_tokens
        first, held = to_device([list(starts), list(num_held)], torch.int64, device)
        places = held[:, None] + order
        slots = table.long().gather(1, places // page_size) * page_size + places % page_size
        ends = torch.arange(num_requests + 1, dtype=torch.int32) * num_tokens
        common = CommonAttentionMetadata(
            query_start_loc=to_device(ends, torch.int32, device),
            query_start_loc_cpu=ends,
            seq_lens=(held + num_tokens).int(),
            seq_lens_cpu_upper_bound=lengths,  # exact, because some backends plan pages from it
            num_reqs=num_requests,
            num_actual_tokens=total,
            max_query_len=num_tokens,
            max_seq_len=max(num_held) + num_tokens,
            block_table_tensor=table,
            slot_mapping=slots.flatten(),
            is_prefilling=torch.zeros(num_requests, dtype=torch.bool),
        )
        ((group,),) = runner.attn_groups
        metadata = group.get_metadata_builder().build(0, common)
        context = set_forward_context(
            dict.fromkeys(group.layer_names, metadata),
            runner.vllm_config,
            num_tokens=total,
            slot_mapping=dict.fromkeys(group.layer_names, common.slot_mapping),
        )
        positions = (first[:, None] + order).flatten()
        with context, self._ring.handing_out() as seen:
            hidden = runner.model(input_ids=tokens.flatten().int(), positions=positions)
        queries = self._ring.scaled(torch.stack(seen).unflatten(1, (num_requests, num_tokens)).transpose(0, 1))
        return hidden.unflatten(0, (num_requests, num_tokens))[:, -1], queries

    def question(self, request_id: str, num_tokens: int) -> list[int]:
        """Return the last tokens of a request's prompt."""
        return list(self._prompt(request_id)[-num_tokens:])
