"""Attention with fading keys, for Hugging Face models."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

NAME = "skipkv_fading"
"""The `attn_implementation` of a model to train."""
EXTRA = 8
"""Features added to each head. Two are used; kernels need a multiple of 8."""


def fading_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    """Compute causal attention in float32, with `(t - i) * log beta_i` added to the logit of query t and key i.

    The term equals `t * log beta_i - i * log beta_i`: two more features of query and key. PyTorch's fused kernels can
    therefore compute it without a `[T, T]` matrix in memory.

    Args:
        module: attention block; its `log_beta` is float `[n, T, H]`, or None if no key fades.
        query: `[n, Hq, T, D]`.
        key, value: `[n, H, T, D]`.
        attention_mask, options: ignored.
        scaling: of the logits.

    Returns:
        `[n, T, Hq, D]`, in the dtype of `query`, and None for the weights.
    """
    groups, size = query.shape[1] // key.shape[1], value.shape[-1]
    q, k, v = query.float() * scaling, key.float(), value.float()
    if module.log_beta is not None:
        fading = module.log_beta.mT[..., None]  # [n, H, T, 1]
        places = torch.arange(query.shape[2], dtype=torch.float32, device=query.device)[:, None]
        ones = torch.ones_like(places)
        q = torch.cat([q, F.pad(torch.cat([places, ones], -1), (0, EXTRA - 2)).expand(*q.shape[:-1], EXTRA)], -1)
        k = torch.cat([k, F.pad(torch.cat([fading, -places * fading], -1), (0, EXTRA - 2))], -1)
        v = F.pad(v, (0, EXTRA))
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)[..., :size]
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, fading_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
