"""Small random models and texts."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from skipkv_vllm.training import attention
from skipkv_vllm.training.student import Student

LENGTH, CAPACITY, VOCABULARY = 24, 6, 20
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
KINDS = ("Llama", "Qwen2", "Qwen3", "Granite", "SmolLM3", "Qwen3Moe")


def random_model(kind: str = "Llama", implementation: str = attention.NAME, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{"vocab_size": VOCABULARY} | SHAPE | changes)
    if kind == "Granite":
        config.logits_scaling = 3.0
    config._attn_implementation = implementation
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, ids.clone()


def set_bias(student: Student, bias: float) -> None:
    for gate in student.gates:
        nn.init.constant_(gate.second.bias, bias)
