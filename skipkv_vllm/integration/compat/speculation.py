"""Speculative decoding beside eviction: what is refused, the slots that drafts take, and the layers of drafters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...core.needs import Need
from .refusals import refusal

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import VllmConfig

    from ...config import KVPolicyConfig

DRAFTERS = ("ngram", "ngram_gpu", "suffix", "custom_class", "eagle", "eagle3", "mtp", "draft_model")
"""Methods of speculative decoding that are served."""

IS_DRAFT = "_skipkv_is_draft"
"""Attribute of the attention layers of a drafter."""


def num_draft_slots(vllm_config: VllmConfig) -> int:
    """Return how many slots drafts may take beyond a request's tokens: its own, and those of a drafter ahead of it.

    At its end every step in flight but the first may compute nothing but drafts.
    """
    if vllm_config.speculative_config is None:
        return 0
    own = vllm_config.max_concurrent_batches * (1 + vllm_config.num_speculative_tokens) - 1
    return own + vllm_config.num_lookahead_tokens


def mark_draft_layers(vllm_config: VllmConfig, model: nn.Module) -> None:
    """Mark the layers that are not the model's own, once both the model and its drafter are loaded."""
    if vllm_config.speculative_config is None:
        return
    own = set(map(id, model.modules()))
    for layer in vllm_config.compilation_config.static_forward_context.values():
        setattr(layer, IS_DRAFT, id(layer) not in own)


def is_draft_layer(layer: Any) -> bool:
    """Return whether a layer belongs to a drafter."""
    return getattr(layer, IS_DRAFT, False)


def check_speculation(vllm_config: VllmConfig, policy: KVPolicyConfig) -> None:
    """Refuse drafters that were not tested, and what does not keep the number of tokens exact beside drafts."""
    speculation, model = vllm_config.speculative_config, vllm_config.model_config
    if speculation is None:
        return
    drop = "Drop --speculative-config"
    if speculation.method not in DRAFTERS or speculation.parallel_drafting:
        name = "parallel drafting" if speculation.parallel_drafting else f"the drafter {speculation.method!r}"
        raise refusal(name, f"only {', '.join(DRAFTERS)} are served; others were not tested", drop)
    if speculation.enable_adaptive_verification or speculation.uses_dynamic_speculative_decoding():
        raise refusal("a number of drafts that changes while the server runs", "it was not tested", drop)
    if policy.needs & Need.LOOKAHEAD:
        names = ", ".join(repr(each.name) for each in policy.policies if each.lookahead_plan is not None)
        raise refusal(f"{names} beside speculative decoding", "both compute tokens ahead in the same slots", drop)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise refusal(
            "speculative decoding in a pipeline",
            "more steps are in flight than the scheduler waits for to learn which drafts were accepted",
            f"{drop} or --pipeline-parallel-size",
        )
    if model.is_hybrid or model.get_sliding_window() is not None:
        raise refusal(
            "speculative decoding with models that have a sliding window or a state in some layers",
            "it was not tested",
            drop,
        )
    most = min(policy.kv_buffer, policy.num_queries or policy.kv_buffer)
    most = (min(most, policy.kv_recall_interval) if policy.recalls else most) - 1
    if policy.evicts and vllm_config.num_speculative_tokens > most:
        raise refusal(
            f"{vllm_config.num_speculative_tokens} speculative tokens",
            f"a request grows by {most + 1} tokens between two points at which its exact number must be known",
            f"Set num_speculative_tokens to at most {most}, or raise --kv-buffer"
            + (" and --kv-recall-interval" if policy.recalls else ""),
        )


def check_drafter(scheduler: Any) -> None:
    """Refuse a drafter that decides where the chunks of a prompt end, as a compaction does.

    Raises:
        KVPolicyError: if the scheduler has such a one.
    """
    if getattr(scheduler, "num_prefill_lookahead", 0) > 1:
        raise refusal(
            "several modules of multi-token prediction",
            "they decide where the chunks of a prompt end, as compactions do",
            "Drop --speculative-config",
        )
