"""Decoding ahead on temporary copies of caches: the target model is its own draft model, for its queries only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..ops.paging import to_device
from .queries import QueryRing

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class Prober:
    """Runs the model of vLLM's Model Runner V1 between two steps, outside CUDA graphs, on tensors of its own.

    Args:
        runner: with its KV cache bound.
        ring: sees the queries.
    """

    def __init__(self, runner: GPUModelRunner, ring: QueryRing) -> None:
        self._runner, self._ring = runner, ring
        self.max_length: int = runner.max_model_len

    def decode(
        self,
        tokens: Tensor,
        starts: Sequence[int],
        num_held: Sequence[int],
        table: Tensor,
        page_size: int,
        num_tokens: int,
    ) -> Tensor:
        """Decode greedily for R requests.

        Args:
            tokens: integer `[R]`, the first token of each.
            starts: its logical position.
            num_held: tokens in the pages so far.
            table: int32 `[R, pages]` kernel pages with room for the tokens.
            page_size: tokens of such a page.
            num_tokens: of each request; the last one's logits are not needed.

        Returns:
            Post-RoPE queries of the tokens, `[R, layers, num_tokens, Hq, D]`.
        """
        runner, device, num_requests = self._runner, table.device, len(starts)
        ((group,),) = runner.attn_groups
        first, held = to_device([list(starts), list(num_held)], torch.int32, device)
        each = torch.arange(num_requests + 1, dtype=torch.int32)
        queries = []
        for i in range(num_tokens):
            page = table.gather(1, ((held + i) // page_size)[:, None].long())[:, 0].long()
            slots = page * page_size + (held + i) % page_size
            common = CommonAttentionMetadata(
                query_start_loc=each.to(device),
                query_start_loc_cpu=each,
                seq_lens=held + (i + 1),
                num_reqs=num_requests,
                num_actual_tokens=num_requests,
                max_query_len=1,
                max_seq_len=max(num_held) + i + 1,
                block_table_tensor=table,
                slot_mapping=slots,
                seq_lens_cpu_upper_bound=torch.tensor(num_held, dtype=torch.int32) + (i + 1),
                is_prefilling=torch.zeros(num_requests, dtype=torch.bool),
            )
            metadata = group.get_metadata_builder().build(0, common)
            context = set_forward_context(
                dict.fromkeys(group.layer_names, metadata),
                runner.vllm_config,
                num_tokens=num_requests,
                slot_mapping=dict.fromkeys(group.layer_names, slots),
            )
            with context, self._ring.handing_out() as seen:
                hidden = runner.model(input_ids=tokens.int(), positions=first.long() + i)
            queries.append(torch.stack(seen))
            if i + 1 < num_tokens:
                tokens = runner.model.compute_logits(hidden).argmax(dim=-1)
        return torch.stack(queries).permute(2, 1, 0, 3, 4)
