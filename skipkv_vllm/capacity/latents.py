"""Models with latents (MLA), as a configuration says."""

from __future__ import annotations

from typing import Any

from ..ops.paging import MAX_LATENT, ROTATED

OTHER_CACHES = {
    "index_topk": "native sparse attention",
    "compress_ratios": "latents of several tokens",
    "linear_attn_config": "layers that keep a state beside latents",
    "layer_group_size": "layers that keep a state beside latents",
}
"""Setting of a configuration -> what it says that its cache holds besides latents of single tokens."""


def has_latents(text_config: Any) -> bool:
    """Return whether a layer caches a latent for each token instead of a key and a value of each kv head."""
    return getattr(text_config, "kv_lora_rank", None) is not None


def key_size(text_config: Any) -> int:
    """Return the elements of a key, which is what a layer caches of a token: its latent and rotated features."""
    size: int = text_config.kv_lora_rank + text_config.qk_rope_head_dim
    return size


def query_size(text_config: Any) -> int:
    """Return the elements of a query before it is absorbed."""
    size: int = text_config.qk_nope_head_dim + text_config.qk_rope_head_dim
    return size


def unread_latents(text_config: Any) -> str | None:
    """Return what kernels for GPUs cannot read in a model's latents; None if they read them."""
    rank, rotated = text_config.kv_lora_rank, text_config.qk_rope_head_dim
    if rotated != ROTATED:
        return f"latents (MLA) with {rotated} rotated features, of which operators read those with {ROTATED}"
    if rank > MAX_LATENT or rank % 16:
        return f"latents (MLA) of {rank} features, of which kernels for GPUs take up to {MAX_LATENT}, in steps of 16"
    return None


def unsupported_latents(text_config: Any) -> str | None:
    """Return what a policy cannot serve in a model with latents on a GPU; None if nothing is known."""
    for setting, found in OTHER_CACHES.items():
        if getattr(text_config, setting, None):
            return found
    return unread_latents(text_config)
