"""A frozen model with a gate before each attention block."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_utils import AttentionInterface

from ..core.errors import KVPolicyError
from ..ops.gates import check_activation, log_beta
from ..policies.gates import INPUT, Gate, Gates
from . import attention

OTHER_ATTENTION = ("sliding_window", "softcap", "s_aux")
"""Options of an attention function that change which keys a query sees."""


class GateNetwork(nn.Module):
    """A trainable gate: hidden states `[..., E]` to `log beta`, float32 `[..., H]`.

    Args:
        hidden_size: E.
        width: units of the hidden layer.
        num_kv_heads: H.
        activation: of `ops.gates.ACTIVATIONS`.
        bias: initial logit of beta; if it is large, no token fades at first.
    """

    def __init__(self, hidden_size: int, width: int, num_kv_heads: int, activation: str, bias: float) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, width)
        self.second = nn.Linear(width, num_kv_heads)
        self._activation = activation
        nn.init.normal_(self.second.weight, std=0.02)
        nn.init.constant_(self.second.bias, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        weight1, bias1 = self.first.weight.to(hidden.dtype), self.first.bias.to(hidden.dtype)
        return log_beta(hidden, weight1, bias1, self.second.weight, self.second.bias, self._activation)

    def gate(self) -> Gate:
        """Return the weights for the file."""
        tensors = (self.first.weight, self.first.bias, self.second.weight, self.second.bias)
        return Gate(*(tensor.detach().cpu() for tensor in tensors))


class Student(nn.Module):
    """A frozen model with a gate before each attention block.

    A gate reads the input of its block, as in the engine. The backward pass computes each decoder layer again, so only
    the layer's input stays in memory until then.

    Args:
        model: a causal language model with `attn_implementation=attention.NAME`.
        width: units of a gate's hidden layer.
        bias: initial logit of beta.

    Raises:
        KVPolicyError: attention or an activation that the engine does not support with gates.
    """

    def __init__(self, model: PreTrainedModel, width: int, bias: float) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config = model.config.get_text_config()
        activation = getattr(config, "hidden_act", "unknown")
        check_activation(activation, "choose another --model")
        self._blocks = attention_blocks(model)
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (config.hidden_size, width, num_kv_heads)
        self._networks = [GateNetwork(*shape, activation, bias) for _ in self._blocks]
        self.gates = nn.ModuleList(self._networks).to(model.device)
        self.head = output_head(model)
        self._is_gated = False
        parents = {id(child): module for module in model.modules() for child in module.children()}
        for gate, block in zip(self._networks, self._blocks, strict=True):
            block.register_forward_pre_hook(functools.partial(self._before_block, gate), with_kwargs=True)
            layer = parents[id(block)]
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def _before_block(self, gate: nn.Module, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = inspect.signature(block.forward).bind(*args, **kwargs).arguments[INPUT]
        block.log_beta = gate(hidden) if self._is_gated else None

    def forward(self, ids: Tensor, *, gated: bool) -> tuple[Tensor, Tensor | None]:
        """Run the model with or without gates.

        Args:
            ids: token ids `[n, T]`.
            gated: whether keys fade.

        Returns:
            Last hidden states `[n, T, E]`, which `head` turns into logits; and `log beta`, float32 `[layers, n, T, H]`,
            or None without gates.
        """
        self._is_gated = gated
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden, torch.stack([block.log_beta for block in self._blocks]) if gated else None

    def trained(self) -> Gates:
        """Return the current gates."""
        return Gates([network.gate() for network in self._networks])


def attention_blocks(model: PreTrainedModel) -> list[Any]:
    """Return the modules that call the attention function, in model order.

    Raises:
        KVPolicyError: attention that does not see all earlier tokens, or a block whose input is not known.
    """
    for number, kind in enumerate(getattr(model.config.get_text_config(), "layer_types", None) or ()):
        if kind != "full_attention":
            raise _refuse(f"layer {number} of {type(model).__name__} is {kind!r}")
    called: list[tuple[Any, dict[str, Any]]] = []

    def record(module: Any, *args: Any, **options: Any) -> tuple[Tensor, None]:
        called.append((module, options))
        module.log_beta = None
        return attention.fading_attention(module, *args, **options)

    AttentionInterface.register(attention.NAME, record)
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        AttentionInterface.register(attention.NAME, attention.fading_attention)
    for number, (block, options) in enumerate(called):
        if other := [name for name in OTHER_ATTENTION if options.get(name) is not None]:
            raise _refuse(f"layer {number} of {type(model).__name__} has {other[0]}={options[other[0]]}")
        if INPUT not in inspect.signature(block.forward).parameters:
            raise _refuse(f"the attention block of {type(model).__name__}, {type(block).__name__}, lacks {INPUT}")
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(called) != num_layers:
        raise _refuse(f"{len(called)} of {type(model).__name__}'s {num_layers} layers call Hugging Face's attention")
    return [block for block, _ in called]


def _refuse(found: str) -> KVPolicyError:
    return KVPolicyError(
        f"--model: {found}; gates can only be trained for models with 'full_attention' in all layers (Qwen2, Qwen3, "
        "Llama, ...). Choose another --model"
    )


def output_head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the function from a model's last hidden states `[N, E]` to logits `[N, vocabulary]`."""
    head = copy.copy(model)
    head._modules = model._modules | {model.base_model_prefix: _Identity()}
    return lambda hidden: head(inputs_embeds=hidden[None], use_cache=False).logits[0]


class _Identity(nn.Module):
    """Replacement for a model's decoder, with or without experts, that returns its input."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)
