"""The groups of vLLM's KV cache: the one that is compacted, and what requests hold in the others.

vLLM divides the layers of a model into groups. A request has a block table in each, and all groups take their blocks
from one pool. A policy compacts the group of the layers with full attention, which is the only one that grows with the
text. Layers that read a sliding window of it, or keep a state of it, stay as vLLM manages them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...capacity import groups_of
from ...core.errors import KVPolicyError
from ...core.limits import OtherGroup, OtherGroups, state_group, window_group
from ...core.needs import Need
from .flags import policy_config
from .refusals import OTHER_MODEL, Refuse, refusal
from .speculation import is_draft_layer
from .version import located
from .watched import POOL_GROUPS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

    from ...config import KVPolicyConfig


@dataclass(frozen=True)
class CacheGroups:
    """The groups of an engine's KV cache.

    Attributes:
        evicting: index of the group that is compacted.
        layer_names: its layers, those of a drafter included.
        num_draft_layers: how many of them belong to a drafter.
        spec: its layers' KV, as vLLM describes it.
        num_pooled_layers: layers whose KV a block of the pool has room for: those of the largest group, because a block
            serves one group at a time.
        others: the groups that are not compacted.
    """

    evicting: int
    layer_names: Sequence[str]
    num_draft_layers: int
    spec: FullAttentionSpec
    num_pooled_layers: int
    others: OtherGroups


def cache_groups(vllm_config: VllmConfig, groups: Sequence[KVCacheGroupSpec] | None = None) -> CacheGroups:
    """Describe the groups of an engine's KV cache.

    Args:
        vllm_config: of the engine.
        groups: vLLM's groups; None to plan them as vLLM will, from the model that is loaded.

    Raises:
        KVPolicyError: the groups are not supported; it names what was found.
    """
    groups = _planned(vllm_config) if groups is None else groups
    policy = policy_config(vllm_config)
    evicting = _evicting(groups, policy, has_drafter=vllm_config.speculative_config is not None)
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        _check_chosen_layers(groups[evicting].layer_names, policy)
    others = [group.kv_cache_spec for i, group in enumerate(groups) if i != evicting]
    return CacheGroups(
        evicting,
        groups[evicting].layer_names,
        _num_draft_layers(vllm_config, groups[evicting].layer_names),
        groups[evicting].kv_cache_spec,
        max(len(group.layer_names) for group in groups),
        OtherGroups(
            tuple(map(_other_group, others)),
            vllm_config.max_in_flight_tokens,
            vllm_config.max_concurrent_batches,
        ),
    )


def may_have_several_groups(vllm_config: VllmConfig) -> bool:
    """Return whether some layers may read a window only or keep a state, before the model is loaded."""
    return vllm_config.model_config.is_hybrid or vllm_config.model_config.get_sliding_window() is not None


def _other_group(spec: SlidingWindowSpec | MambaSpec) -> OtherGroup:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    if isinstance(spec, SlidingWindowSpec):
        return window_group(spec.sliding_window + spec.extra_retained_tokens, spec.block_size)
    return state_group(
        spec.block_size,
        has_prefix_cache=spec.mamba_cache_mode == "align",
        num_extra=spec.num_speculative_blocks + spec.num_prefill_checkpoint_blocks,
    )


def _evicting(groups: Sequence[KVCacheGroupSpec], policy: KVPolicyConfig, *, has_drafter: bool = False) -> int:
    from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

    specs = [group.kv_cache_spec for group in groups]
    refuse = functools.partial(refusal, flag="--kv-policy" if policy.evicts else "--kv-steering-vectors")
    full = [i for i, spec in enumerate(specs) if _is_full(spec)]
    if len(full) != 1 or any(not _is_full(spec) and type(spec) not in (SlidingWindowSpec, MambaSpec) for spec in specs):
        found = ", ".join(type(spec).__name__ for spec in specs) or "none"
        if has_drafter:
            raise refuse(
                f"this drafter beside this model (their KV cache is {found})",
                "both must have KV of one shape: as many kv heads of the same size, full attention, and the same dtype",
                "Use another drafter, or drop --speculative-config",
            )
        raise refuse(
            f"this model's KV cache ({found})",
            "it must be one group of full-attention layers, and any number of groups with a sliding window or a state",
            OTHER_MODEL,
        )
    if len(specs) > 1 and policy.needs & Need.LOOKAHEAD:
        names = ", ".join(repr(each.name) for each in policy.policies if each.lookahead_plan is not None)
        raise refuse(
            f"{names} for models with a sliding window or a state in some layers",
            "it computes tokens ahead, which would overwrite these layers' KV or states",
            "Use other methods",
        )
    _check_spec(specs[full[0]], refuse)
    return full[0]


def _check_chosen_layers(layer_names: Sequence[str], policy: KVPolicyConfig) -> None:
    """Refuse a method that measures attention in some layers if none of these is compacted."""
    from vllm.model_executor.models.utils import extract_layer_index

    for each in policy.policies:
        chosen = each.segment_options.layers if each.needs & Need.SEGMENTS else ()
        numbers = sorted(map(extract_layer_index, layer_names)) if chosen else []
        if chosen and not set(chosen) & set(numbers):
            raise KVPolicyError(
                f"kv_policy={each.name!r}: layers={','.join(map(str, chosen))!r}, but only layers "
                f"{', '.join(map(str, numbers))} of this model have full attention; name some of these in "
                "kv_policy_config, or write 'all'"
            )


def _check_spec(spec: Any, refuse: Refuse) -> None:
    """Refuse blocks other than those of one key and one value per token that all later tokens attend to."""
    # Without its manager of several groups vLLM declares layers with a window as full.
    for name in ("sliding_window", "attention_chunk_size", "non_causal"):
        if value := getattr(spec, name):
            raise refuse(
                f"attention with {name}={value} in the group of full attention",
                "its mask needs the positions of all tokens",
                "Drop --disable-hybrid-kv-cache-manager if it is set, or serve another model",
            )
    packed = (spec.num_head_slots, spec.state_content_bytes, spec.tokens_per_state) != (None, None, 1)
    # vLLM states that a latent has no value, because it is its own.
    value_size, is_other_latent = spec.head_size, False
    if has_latents(spec):
        value_size, is_other_latent = 0, spec.model_version is not None or spec.alignment is not None
        if spec.dtype.itemsize == 1:
            # The checkpoint may have chosen it.
            raise refuse(
                "latents (MLA) of 8 bits",
                "kernels differ in how they pack and scale them",
                "Use --kv-cache-dtype bfloat16",
            )
    if packed or is_other_latent or spec.head_size_v != value_size:
        raise refuse(
            f"this model's KV blocks (keys of {spec.head_size} and values of {spec.head_size_v}, "
            f"{spec.num_head_slots or spec.num_kv_heads} cells for {spec.num_kv_heads} heads)",
            "a block must hold a key and a value of the same size for every token and head, or a latent",
            OTHER_MODEL,
        )


def has_latents(spec: Any) -> bool:
    """Return whether a layer's KV is latents (MLA)."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return type(spec) is MLAAttentionSpec


def _is_full(spec: Any) -> bool:
    """Return whether a layer has full attention, so that its KV grows with the text."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return type(spec) is FullAttentionSpec or has_latents(spec)


def _num_draft_layers(vllm_config: VllmConfig, layer_names: Sequence[str]) -> int:
    """Return how many layers a drafter has among those with full attention; the scheduler knows their names only."""
    if vllm_config.speculative_config is None:
        return 0
    return max(0, len(layer_names) - groups_of(vllm_config.model_config.hf_text_config, 1).num_full)


def draft_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the layers of a drafter whose KV lies in the same blocks, by name, once the model is loaded."""
    return {name: layer for name, layer in _full_layers(vllm_config).items() if is_draft_layer(layer)}


def evicting_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """Return the model's layers of this worker whose KV is compacted, by name in model order, once it is loaded."""
    return {name: layer for name, layer in _full_layers(vllm_config).items() if not is_draft_layer(layer)}


def _full_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    context = vllm_config.compilation_config.static_forward_context
    return {
        name: layer
        for name, layer in context.items()
        if hasattr(layer, "impl") and _is_full(layer.get_kv_cache_spec(vllm_config))
    }


def _planned(vllm_config: VllmConfig) -> list[KVCacheGroupSpec]:
    context = vllm_config.compilation_config.static_forward_context
    found = {
        name: layer.get_kv_cache_spec(vllm_config)
        for name, layer in context.items()
        if hasattr(layer, "get_kv_cache_spec") and not getattr(layer, "kv_sharing_target_layer_name", None)
    }
    module, _, name = located(POOL_GROUPS).partition(":")
    get_groups = getattr(importlib.import_module(module), name)
    planned: list[KVCacheGroupSpec] = get_groups(
        vllm_config, {name: spec for name, spec in found.items() if spec is not None}
    )
    return planned
