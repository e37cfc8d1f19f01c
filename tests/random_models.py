"""Tiny models with random weights, one of each family of models whose layers differ, with the bundled tokenizer."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.harness.settings import MODEL

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
    return [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in pattern]


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


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **COMMON, intermediate_size=256, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=64, norm_topk_prob=True,
    )  # fmt: skip


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
        has_window: whether some of its layers have a sliding window.
        change: changes its random weights, or None.
    """

    config: Callable[[], Any]
    has_window: bool
    change: Callable[[Any], None] | None = None


FAMILIES = {
    "gemma3": Family(_gemma3, True),
    "gemma4": Family(_gemma4, True),
    "gpt_oss": Family(_gpt_oss, True, _strong_sinks),
    "qwen3_moe": Family(_qwen3_moe, False),
}


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
