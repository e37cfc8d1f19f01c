"""A vector and models that are made for the measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from skipkv_vllm.evaluation.machine import relative
from skipkv_vllm.steering import SteeringVector


def short_vector(model: str, folder: Path) -> str:
    """Write a vector so short that it changes no token of a float32 model; returns its file."""
    config = AutoConfig.from_pretrained(model)
    path = folder / "short.safetensors"
    SteeringVector(
        values=torch.full((config.hidden_size,), 1e-6),
        layer=config.num_hidden_layers // 2,
        num_layers=config.num_hidden_layers,
        base_model=relative(model),
        method="benchmark",
    ).save(path)
    return str(path)


def random_model(like: str, layers: int, hidden_size: int, folder: Path) -> str:
    """Write a model of another size with random weights, 4 heads of 64 to a kv head, and another's tokenizer.

    Returns:
        Its folder.
    """
    own = folder / "model"
    AutoTokenizer.from_pretrained(like).save_pretrained(own)
    config = AutoConfig.from_pretrained(like)
    config.update(
        {
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "head_dim": 64,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": hidden_size // 256,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(own)
    return str(own)


_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "torch_dtype": "bfloat16"},
    # For trying the command where the other would take too long.
    "small": _QWEN3
    | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 1024, "head_dim": 64}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "torch_dtype": "float32"},
}
"""Name -> published configuration; vLLM draws the weights itself (`load_format="dummy"`), so no network is needed."""


def shaped_model(name: str, like: str, folder: Path) -> str:
    """Write the configuration of a shape, with the tokenizer of the model `like`; returns its folder."""
    own = folder / name
    AutoTokenizer.from_pretrained(like).save_pretrained(own)
    (own / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return str(own)
