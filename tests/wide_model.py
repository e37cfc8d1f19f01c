"""The bundled model with larger heads: the same function, for attention kernels without a head size of 32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FACTOR = 2
"""Factor of the head size. Only a whole number keeps the rotary frequencies."""


def widen(model: Path, folder: Path) -> Path:
    """Write a model that computes the same function as a Qwen2 model, with `FACTOR` times its head size.

    The new features are zero. A rotary embedding turns features i and i + D / 2 at a rate of `theta ** (-2 i / D)`, so
    feature i goes to `FACTOR * i` of its half. The model becomes a Llama, whose head size vLLM takes from its
    configuration.

    Args:
        model: folder of the model.
        folder: an empty one.
    """
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    half = FACTOR * torch.arange(dim // 2)
    rotary = torch.cat([half, half + FACTOR * dim // 2])
    tensors = load_file(model / "model.safetensors")
    for name, tensor in list(tensors.items()):
        kind = name.split(".")[-2]
        if kind in ("q_proj", "k_proj"):
            # Logits are divided by the root of the head size.
            scale = FACTOR**0.5 if kind == "q_proj" else 1.0
            tensors[name] = _spread(tensor * scale, heads if kind == "q_proj" else kv_heads, rotary)
        elif kind == "v_proj":
            tensors[name] = _spread(tensor, kv_heads, torch.arange(dim))
        elif kind == "o_proj":
            tensors[name] = _spread(tensor.T, heads, torch.arange(dim)).T.contiguous()
            tensors[name.replace("weight", "bias")] = torch.zeros(tensor.shape[0])
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": FACTOR * dim}
    config |= {"attention_bias": True, "mlp_bias": False}
    for name in ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"):
        config.pop(name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _spread(rows: Tensor, heads: int, place: Tensor) -> Tensor:
    """Rows `[heads * D, ...]` of which row d of each head moves to `place[d]`; `[heads * FACTOR * D, ...]`."""
    by_head = rows.unflatten(0, (heads, -1))
    wide = torch.zeros(heads, FACTOR * by_head.shape[1], *rows.shape[1:], dtype=rows.dtype)
    wide[:, place] = by_head
    return wide.flatten(0, 1)
