"""A vector and a model that are made for the measurement."""

from __future__ import annotations

from pathlib import Path

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
