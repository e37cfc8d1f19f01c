"""Attention over the paged cache: with plain PyTorch, or with vLLM's Triton kernel where it is to be had."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipkv_vllm.ops.paging import LayerPages, Layout
from tests.small_engine.buffers import Inputs
from tests.small_engine.pages import PageReader, PageWriter
from tests.small_engine.shape import Shape

CARRIED = "SKIPKV_CARRIED_ATTENTION"
"""Environment variable with the folder of vLLM's kernel without the rest of vLLM; see `scripts/gpu_check`."""

NUM_SEGMENTS, MOST_SPLIT = 16, 128
"""As in vLLM: parts of a request's tokens that blocks of a decode attend to, and requests up to which it is split."""


def triton_kernel() -> Callable[..., None] | str:
    """Return vLLM's `unified_attention`, or why it is not to be had."""
    folder = os.environ.get(CARRIED)
    if not folder:
        return f"{CARRIED} is not set"
    if folder not in sys.path:
        sys.path.insert(0, folder)
    kernel: Callable[..., None] = importlib.import_module("paged_attention.triton_unified_attention").unified_attention
    return kernel


class PagedAttention:
    """The attention implementation of a layer, as the query ring expects it of an engine.

    Args:
        pages: of the layer.
        shape: sizes.
        length: tokens that a block table has room for.
        kernel: vLLM's Triton kernel, or None for PyTorch.
    """

    def __init__(self, pages: LayerPages, shape: Shape, length: int, kernel: Callable[..., None] | None) -> None:
        assert kernel is None or pages.layout is Layout.ROWS
        self._shape, self._pages = shape, pages
        self._writer, self._reader = PageWriter(pages), PageReader(pages, length)
        self._order = torch.arange(length, dtype=torch.int32, device=shape.device)
        self._kernel = kernel
        if kernel is not None:
            parts = (MOST_SPLIT, shape.query_heads, NUM_SEGMENTS)
            self._parts = torch.zeros(*parts, shape.head_size, dtype=torch.float32, device=shape.device)
            self._most, self._sums = (torch.zeros(parts, dtype=torch.float32, device=shape.device) for _ in range(2))

    def forward(self, layer: object, query: Tensor, key: Tensor, value: Tensor, inputs: Inputs) -> Tensor:
        """Write K and V `[T, H, D]` into the cache and return the attention `[T, Hq, D]` of the queries over it."""
        self._writer.write(key, value, inputs.slots)
        return self._with_torch(query, inputs) if self._kernel is None else self._with_triton(query, inputs)

    def _with_torch(self, query: Tensor, inputs: Inputs) -> Tensor:
        keys, values = (x.float() for x in self._reader.read(inputs.table[inputs.place]))
        grouped = query.float().unflatten(1, (self._shape.kv_heads, self._shape.group))
        logits = grouped @ keys.mT / self._shape.head_size**0.5
        hidden = self._order >= inputs.reach[:, None, None, None]
        out = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ values
        return out.flatten(1, 2).to(query.dtype)

    def _with_triton(self, query: Tensor, inputs: Inputs) -> Tensor:
        keys, values = self._pages.raw.transpose(1, 2).split(self._shape.head_size, dim=-1)
        out = torch.empty_like(query)
        options: dict[str, Any] = {
            "softmax_scale": self._shape.head_size**-0.5,
            "causal": True,
            "window_size": (-1, -1),
            "softcap": 0,
            "q_descale": None,
            "k_descale": None,
            "v_descale": None,
        }
        assert self._kernel is not None
        self._kernel(
            q=query,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=inputs.starts,
            max_seqlen_q=inputs.longest,
            seqused_k=inputs.lengths,
            max_seqlen_k=self._order.shape[0],
            block_table=inputs.table,
            seq_threshold_3D=MOST_SPLIT,
            num_par_softmax_segments=NUM_SEGMENTS,
            softmax_segm_output=self._parts,
            softmax_segm_max=self._most,
            softmax_segm_expsum=self._sums,
            **options,
        )
        return out
