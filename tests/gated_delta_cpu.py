"""Lets CPUs compute layers of the gated delta net in float32, for tests only.

vLLM's own kernels for CPUs compute in bfloat16 only, in which a comparison of tokens with another implementation says
little. This one computes the recurrence token by token, in float32, on the states that vLLM keeps in its blocks. All
else is vLLM's: which block holds the state of which request, when a request begins without one, and when a state is
copied to another block.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def use_float32() -> None:
    """Replace vLLM's computation in this process; call before the model is built."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    original = gdn_attention.cpu_gdn_attention_core

    def core(mixed_qkv: Tensor, b: Tensor, a: Tensor, core_attn_out: Tensor, layer_name: Any) -> None:
        if mixed_qkv.dtype != torch.float32:
            original(mixed_qkv, b, a, core_attn_out, layer_name)
            return
        from vllm.forward_context import get_forward_context
        from vllm.utils.torch_utils import _resolve_layer_name

        context, name = get_forward_context(), _resolve_layer_name(layer_name)
        if context.attn_metadata is not None:  # else vLLM measures its memory
            layer = context.no_compile_layers[name]
            _compute(layer, context.attn_metadata[layer.prefix], mixed_qkv, b, a, core_attn_out)

    # vLLM makes an operator with this signature when the first layer is built.
    core.__signature__ = inspect.signature(original, eval_str=True)  # type: ignore[attr-defined]
    gdn_attention.cpu_gdn_attention_core = core


def _compute(layer: Any, metadata: Any, mixed_qkv: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
    """Compute all requests of a step, one after the other."""
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    rows, starts = metadata.non_spec_state_indices_tensor, metadata.non_spec_query_start_loc
    num_rows = metadata.num_decodes + metadata.num_prefills
    has_state = metadata.has_initial_state
    conv_states = layer.kv_cache[0] if is_conv_state_dim_first() else layer.kv_cache[0].mT
    heads, keys, values = layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
    states = layer.kv_cache[1].view(-1, heads, keys, values)
    decay = (-layer.A_log.float().exp() * F.softplus(a + layer.dt_bias)).exp()
    for i, row in enumerate(rows[:num_rows].tolist()):
        first, last = starts[i : i + 2].tolist()
        if has_state is not None and not has_state[i]:
            conv_states[row], states[row] = 0, 0
        convolved = _convolved(layer, mixed_qkv[first:last], conv_states[row])
        q, k, v = convolved.split([layer.num_k_heads * keys, layer.num_k_heads * keys, heads * values], dim=-1)
        q, k = (x.unflatten(1, (-1, keys)).repeat_interleave(heads // layer.num_k_heads, dim=1) for x in (q, k))
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        v, q = v.unflatten(1, (heads, values)), q * keys**-0.5
        for j in range(last - first):
            state = states[row] * decay[first + j, :, None, None]
            error = v[j] - (k[j, :, None] @ state)[:, 0]
            state += k[j, :, :, None] * (b[first + j].sigmoid()[:, None] * error)[:, None]
            out[first + j] = (q[j, :, None] @ state)[:, 0]
            states[row] = state


def _convolved(layer: Any, new: Tensor, state: Tensor) -> Tensor:
    """Return the new tokens' `[new, channels]` convolution with the previous ones, which `state` becomes."""
    text = torch.cat([state, new.mT], dim=1)
    state.copy_(text[:, -state.shape[1] :])
    weight = layer.conv1d.weight
    return F.silu(F.conv1d(text[None], weight, layer.conv1d.bias, groups=len(weight))[0]).mT
