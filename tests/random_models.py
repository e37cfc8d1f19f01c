"""Tiny models with random weights, one of each family of models whose layers differ, with the bundled tokenizer."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.harness.settings import MODEL, PAGE

WINDOW = 80
"""Tokens of a sliding window; not a multiple of the block size."""
COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,  # else every token would be its own most likely successor
    "initializer_range": 0.2,
}


def _kinds(pattern: str) -> list[str]:
    names = {"s": "sliding_attention", "l": "linear_attention", "f": "full_attention"}
    return [names[kind] for kind in pattern]


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    # The three layers with a window are two groups of the cache, one of which has room to spare. Logits have a scale of
    # their own.
    return Gemma3TextConfig(
        **COMMON,
        intermediate_size=256,
        num_hidden_layers=5,
        layer_types=_kinds("ssfsf"),
        sliding_window=WINDOW,
        query_pre_attn_scalar=48,
    )


EXPERTS: dict[str, Any] = {
    "intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(**COMMON, **EXPERTS, num_hidden_layers=4)


def _qwen3_next() -> Any:
    from transformers import Qwen3NextConfig

    # The three layers of the gated delta net are two groups of the cache, one of which has room to spare. A state is as
    # large as the KV of 38 tokens.
    return Qwen3NextConfig(
        **COMMON,
        **EXPERTS,
        num_hidden_layers=5,
        layer_types=_kinds("llflf"),
        shared_expert_intermediate_size=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **COMMON, intermediate_size=64, num_hidden_layers=4, layer_types=_kinds("sfsf"), sliding_window=WINDOW,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


def _gemma4() -> Any:
    from transformers import Gemma4TextConfig

    # Layers with full attention have fewer kv heads, which are larger, and read keys as values.
    return Gemma4TextConfig(
        **COMMON,
        intermediate_size=256,
        num_hidden_layers=6,
        layer_types=_kinds("ssfssf"),
        sliding_window=WINDOW,
        global_head_dim=64,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        use_double_wide_mlp=False,
        vocab_size_per_layer_input=512,
    )


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config

    # vLLM's kernels for CPUs read latents of this size only, and rotate keys rightly only with YaRN.
    return DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4, "head_dim": 64},
        intermediate_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=1,
        topk_group=1,
        topk_method="noaux_tc",  # as in real configurations; transformers knows no other
        scoring_func="sigmoid",
        kv_lora_rank=512,
        q_lora_rank=64,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 1024,
        },
    )


def _strong_sinks(model: Any) -> None:
    """Let sinks take from a little to most of the attention; beside the logits of random weights they would vanish."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.data *= 0.2
        attention.sinks.data = torch.linspace(3.0, 9.0, len(attention.sinks))


class Family(NamedTuple):
    """A family of models.

    Attributes:
        config: makes its configuration.
        is_special: whether its cache is not that of plain models: a window or a state in some layers, or latents.
        change: changes its random weights, or None.
        block_size: tokens of a block, at least what vLLM makes of it.
        pool: blocks that are too few for the requests of the tests at their full length, and enough at their bound.
            A block is the larger, the fewer groups there are.
        small_pool: blocks that are too few at their bound.
    """

    config: Callable[[], Any]
    is_special: bool
    change: Callable[[Any], None] | None = None
    block_size: int = PAGE
    pool: int = 92
    small_pool: int = 40


FAMILIES = {
    "deepseek_v3": Family(_deepseek_v3, True, block_size=16, pool=84, small_pool=40),
    "gemma3": Family(_gemma3, True),
    "gemma4": Family(_gemma4, True),
    "gpt_oss": Family(_gpt_oss, True, _strong_sinks, pool=68, small_pool=30),
    "qwen3_moe": Family(_qwen3_moe, False),
    "qwen3_next": Family(_qwen3_next, True, block_size=64, pool=42, small_pool=24),
}


def model_of(family: str) -> dict[str, Any]:
    """Return the arguments of an engine with a family's model."""
    return {"model": random_model(family), "block_size": FAMILIES[family].block_size}


@functools.cache
def random_model(family: str) -> str:
    """Return the folder of a family's model, which is removed at exit."""
    import atexit

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tempfile.mkdtemp(prefix=f"skipkv-{family}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = FAMILIES[family].config()
    config.vocab_size, config.bos_token_id = len(tokenizer), None
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (change := FAMILIES[family].change) is not None:
        change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(Path(folder))
