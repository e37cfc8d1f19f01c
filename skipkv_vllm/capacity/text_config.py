"""What a model's Hugging Face configuration says about its KV cache, before vLLM loads the model."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.limits import NO_OTHERS, OtherGroups, ceil_div, state_group, window_group
from ..ops.paging import MAX_HEAD_SIZE
from .latents import has_latents, key_size, query_size, unsupported_latents
from .sizes import ModelShape
from .states import STATE, STATE_MODELS, StateSizes, block_size_beside_states, has_states

FULL, WINDOW = "full_attention", "sliding_attention"


class Groups(NamedTuple):
    """The groups of the KV cache that vLLM makes of a model's layers.

    Attributes:
        num_full: layers with full attention; they are one group.
        num_others: groups of layers with a sliding window or a state.
        size: layers whose KV a block of the pool has room for.
        block_size: tokens of a block of the full group.
        other_block_size: tokens of a block of the others, whose blocks have the same bytes.
    """

    num_full: int
    num_others: int
    size: int
    block_size: int
    other_block_size: int


def kinds_of(text_config: Any) -> list[str]:
    """Return the kind of attention of each layer."""
    number = getattr(text_config, "num_hidden_layers", 0)
    kinds: list[str] | None = getattr(text_config, "layer_types", None)
    if kinds is not None:
        return list(kinds)[:number]
    has_window = getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True)
    return [WINDOW if has_window else FULL] * number


def unsupported(text_config: Any) -> str | None:
    """Return what a policy cannot serve in this model on a GPU; None if nothing is known."""
    if has_latents(text_config) and (found := unsupported_latents(text_config)) is not None:
        return found
    if getattr(text_config, "attn_logit_softcapping", None):
        return "a soft cap of logits"
    if getattr(text_config, "num_kv_shared_layers", None):
        return "layers that share a cache"
    kinds = set(kinds_of(text_config))
    if STATE in kinds and text_config.model_type not in STATE_MODELS:
        return f"{STATE} in a model other than {', '.join(STATE_MODELS)}"
    if FULL not in kinds or not ({FULL, WINDOW} >= kinds or {FULL, STATE} >= kinds):
        return ", ".join(sorted(kinds))
    head_size = kv_of(text_config)[1]
    if head_size > MAX_HEAD_SIZE and not has_latents(text_config):
        return f"heads of {head_size} features, of which kernels for GPUs take at most {MAX_HEAD_SIZE}"
    groups = groups_of(text_config, 1)
    return None if groups.num_full <= groups.size else f"{groups.num_full} full and fewer sliding layers"


def groups_of(text_config: Any, block_size: int, ranks: int = 1) -> Groups:
    """Compute the groups.

    Args:
        text_config: `transformers` configuration of the language model.
        block_size: vLLM's, that of the layers with the largest KV.
        ranks: tensor-parallel ranks. Where they repeat the few kv heads of a kind, its share of the bytes grows.
    """
    kinds = kinds_of(text_config)
    num_full, num_windowed = kinds.count(FULL), len(kinds) - kinds.count(FULL)
    if not num_windowed or not num_full:
        return Groups(num_full, 0, num_full, block_size, block_size)
    # As vLLM does: groups as large as the smaller kind, or one of each if the kinds are nearly as large.
    fewest, most = sorted((num_full, num_windowed))
    size = most if most < 1.5 * fewest else fewest
    if STATE in kinds:
        return Groups(num_full, ceil_div(num_windowed, size), size, block_size, block_size)
    kinds_of_kv = (kv_of(text_config, FULL), kv_of(text_config, WINDOW))
    full, windowed = (max(1, heads // ranks) * head_size for heads, head_size in kinds_of_kv)
    largest = max(full, windowed)
    return Groups(
        num_full, ceil_div(num_windowed, size), size, block_size * largest // full, block_size * largest // windowed
    )


def block_size_of(text_config: Any, block_size: int, sizes: StateSizes) -> int:
    """Return vLLM's tokens per block, which depend on the size of a state if some layers keep one.

    Args:
        text_config: `transformers` configuration of the language model.
        block_size: `--block-size`.
        sizes: what decides how large a state is.
    """
    heads, head_size = kv_of(text_config)
    return block_size_beside_states(text_config, max(1, heads // sizes.ranks) * head_size, block_size, sizes)


def others_of(
    text_config: Any,
    block_size: int,
    max_in_flight: int,
    num_steps: int,
    ranks: int = 1,
    *,
    has_prefix_cache: bool = True,
) -> OtherGroups:
    """Return the groups that are not compacted.

    Args:
        text_config: `transformers` configuration of the language model.
        block_size: vLLM's; see `block_size_of`.
        max_in_flight, num_steps: see `OtherGroups`.
        ranks: tensor-parallel ranks.
        has_prefix_cache: whether there is a prefix cache.
    """
    groups, window = groups_of(text_config, block_size, ranks), getattr(text_config, "sliding_window", None)
    if not groups.num_others:
        return NO_OTHERS
    if has_states(text_config):
        own = state_group(block_size, has_prefix_cache=has_prefix_cache)
    elif window is None:
        return NO_OTHERS
    else:
        own = window_group(window, groups.other_block_size)
    return OtherGroups((own,) * groups.num_others, max_in_flight, num_steps)


def shape_of(
    text_config: Any, *, ranks: int, element_size: int, stages: int = 1, kv_element_size: int | None = None
) -> ModelShape:
    """Compute the shape of a model on one rank.

    Args:
        text_config: `transformers` configuration of the language model.
        ranks: tensor-parallel ranks; if there are fewer kv heads, they are repeated as in vLLM.
        element_size: bytes per element of a weight.
        stages: pipeline stages; the shape is that of the stage with the most layers.
        kv_element_size: bytes per element of KV, if different.
    """
    kv_heads, head_size = kv_of(text_config, FULL)
    groups = groups_of(text_config, 1)
    return ModelShape(
        num_layers=ceil_div(groups.num_full, stages),
        num_heads=text_config.num_attention_heads // ranks,
        num_kv_heads=max(1, kv_heads // ranks),
        head_size=head_size,
        hidden_size=text_config.hidden_size,
        vocab_size=text_config.vocab_size,
        element_size=element_size,
        kv_element_size=kv_element_size,
        num_pooled_layers=ceil_div(groups.size, stages),
        query_size=query_size(text_config) if has_latents(text_config) else None,
    )


def kv_of(text_config: Any, kind: str = FULL) -> tuple[int, int]:
    """Return the kv heads and the head size of the layers of a kind, which in Gemma 4 differ.

    A latent (MLA) is one kv head.
    """
    if has_latents(text_config):
        return 1, key_size(text_config)
    layers, kinds = getattr(text_config, "per_layer_config", None), kinds_of(text_config)
    config = text_config if layers is None or kind not in kinds else layers[kinds.index(kind)]
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
