"""Layers that keep a state of the text instead of a key and a value of each token, as a configuration says."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from ..core.limits import ceil_div

STATE = "linear_attention"
"""Name of such layers in `layer_types`."""
STATE_MODELS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Models with such layers that were tested, by `model_type`: all of them have layers of the gated delta net."""
LEAST_BLOCK = 16
"""Attention kernels of GPUs read blocks of a multiple of so many tokens."""


class StateSizes(NamedTuple):
    """What decides how large a state is.

    Attributes:
        ranks: tensor-parallel ranks, which share it.
        last_tokens: bytes per element of what a layer keeps of the last tokens, for its convolution.
        sums: bytes per element of its sums over all tokens.
        kv: bytes per element of the KV of layers with full attention.
    """

    ranks: int
    last_tokens: int
    sums: int
    kv: int


def has_states(text_config: Any) -> bool:
    """Return whether some layers keep a state."""
    return STATE in (getattr(text_config, "layer_types", None) or ())


def state_bytes(text_config: Any, sizes: StateSizes) -> int:
    """Return the bytes of one layer's state on one rank."""
    heads, keys = text_config.linear_num_value_heads, text_config.linear_key_head_dim
    values = text_config.linear_value_head_dim
    channels = 2 * text_config.linear_num_key_heads * keys + heads * values
    last_tokens = (text_config.linear_conv_kernel_dim - 1) * (channels // sizes.ranks)
    return last_tokens * sizes.last_tokens + prod((heads // sizes.ranks, keys, values)) * sizes.sums


def block_size_beside_states(text_config: Any, kv_elements: int, block_size: int, sizes: StateSizes) -> int:
    """Return the tokens of a block of layers with full attention.

    vLLM makes it as large as a state, in steps of `--block-size`, because a block of the pool must serve either.

    Args:
        text_config: `transformers` configuration of the language model.
        kv_elements: elements of a token's keys in one layer, on one rank.
        block_size: `--block-size`.
        sizes: see above.
    """
    if not has_states(text_config):
        return block_size
    step = max(LEAST_BLOCK, block_size)
    return step * ceil_div(state_bytes(text_config, sizes), step * 2 * kv_elements * sizes.kv)
