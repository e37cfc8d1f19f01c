"""The kv heads of the layers that are compacted, which in some models are not those of the other layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...capacity import FULL, kinds_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def total_kv_heads(model_config: ModelConfig) -> int:
    """Return the kv heads of a layer with full attention, on all ranks together.

    `ModelConfig.get_total_num_kv_heads` returns those of the layers that have the most (Gemma 4's sliding ones). A
    latent (MLA) is one head.
    """
    if model_config.use_mla:
        return 1
    kinds = kinds_of(model_config.hf_text_config)
    number = kinds.index(FULL) if FULL in kinds else 0
    return model_config.model_arch_config[number].total_num_kv_heads
