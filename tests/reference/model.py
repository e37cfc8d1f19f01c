"""The language model of the oracle, which records what the scores need."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from tests.reference import formulas

DELIMITER = re.compile(r" ?[.)?!\]}\"'”’。]*\n+")


def _recording_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Plain causal attention that stores the post-RoPE queries `[1, Hq, new, D]` on the module.

    A layer with a sliding window holds all tokens, of which a query reads the newest ones. A sink, `s_aux` `[Hq]`, is a
    logit more of every query, at a token without a value.
    """
    module.recorded_query, module.recorded_weights = query, None
    num_new, num_held = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    # The newest token is the last in the cache whatever was evicted before it, so the order gives the mask.
    hidden = torch.ones(num_new, num_held, dtype=torch.bool).triu(num_held - num_new + 1)
    if sliding_window is not None:
        hidden |= torch.ones(num_new, num_held, dtype=torch.bool).tril(num_held - num_new - sliding_window)
    logits = logits.masked_fill(hidden, float("-inf"))
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :num_held]
    module.recorded_weights = weights
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", _recording_attention)
AttentionMaskInterface.register("recording", lambda *args, **kwargs: None)


def _record_input(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Store the input of an attention block, `[1, new, hidden]`, on it."""
    module.recorded_input = kwargs["hidden_states"]


def absorbed(attention: Any) -> Tensor:
    """Return the queries of the tokens fed last as they meet latents: `[Hq, new, latent + rotated]`.

    They are scaled so that one over the root of their size is the factor of their logits.
    """
    query = attention.recorded_query[0]
    content, rotated = query.split([attention.qk_nope_head_dim, attention.qk_rope_head_dim], dim=-1)
    by_head = attention.kv_b_proj.weight.view(len(query), -1, attention.kv_lora_rank)[:, : attention.qk_nope_head_dim]
    together = torch.cat([content @ by_head, rotated], dim=-1)
    return together * (attention.scaling * together.shape[-1] ** 0.5)


class KeysAndValues(NamedTuple):
    """Keys and values of a layer, `[1, heads, held, D]`."""

    keys: Tensor
    values: Tensor


class Model:
    """A float32 causal language model on the CPU and its sentence delimiters.

    Attributes:
        full: numbers of the layers with full attention, the ones whose KV is evicted.
        has_latents: whether the cache holds latents (MLA) in place of keys, and rotated features in place of values.
    """

    def __init__(self, folder: str) -> None:
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="recording")
        self.lm.eval()
        kinds = getattr(self.lm.config, "layer_types", None) or ["full_attention"] * self.lm.config.num_hidden_layers
        self.full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.evicting = [self.lm.model.layers[i] for i in self.full]
        self.has_latents = getattr(self.lm.config, "kv_lora_rank", None) is not None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer = tokenizer
        self.texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
        self.delimiters = {i for i, text in enumerate(self.texts) if DELIMITER.fullmatch(text)}
        self.added: tuple[int, Tensor] | None = None
        self.gates: list[list[Tensor]] = []
        for layer in self.lm.model.layers:
            layer.register_forward_pre_hook(self._add)
        for layer in self.evicting:
            layer.self_attn.register_forward_pre_hook(_record_input, with_kwargs=True)

    def _add(self, layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.added is None or layer is not self.lm.model.layers[self.added[0]]:
            return None
        return (inputs[0] + self.added[1], *inputs[1:])

    def new_cache(self) -> DynamicCache:
        """Return an empty cache, which holds all tokens of the layers with attention and the state of all others."""
        # By its configuration it would hold no more than the window of a layer that has one.
        has_states = "linear_attention" in (getattr(self.lm.config, "layer_types", None) or ())
        return DynamicCache(config=self.lm.config) if has_states else DynamicCache()

    def full_layers(self, cache: DynamicCache) -> list[Any]:
        """Return keys and values `[1, heads, held, D]` of the layers with full attention, as queries meet them."""
        layers = [cache.layers[i] for i in self.full]
        if self.has_latents:
            # The product of an absorbed query is with both; the latent is the value, too.
            return [KeysAndValues(torch.cat([each.keys, each.values], dim=-1), each.keys) for each in layers]
        return layers

    def load_gates(self, path: str) -> None:
        """Read the learned gates of `trimkv`."""
        tensors = load_file(path)
        names = ("linear1.weight", "linear1.bias", "linear2.weight", "bias")
        self.gates = [
            [tensors[f"model.layers.{i}.self_attn.retention_gate.{name}"] for name in names] for i in self.full
        ]

    def log_betas(self) -> Tensor:
        """Output of the gates for the tokens fed last, `[layers, heads, new]`."""
        entering = [layer.self_attn.recorded_input[0] for layer in self.evicting]
        by_token = [
            [formulas.log_beta(gate, hidden) for hidden in rows]
            for gate, rows in zip(self.gates, entering, strict=True)
        ]
        return torch.tensor(by_token).transpose(1, 2)

    def forward(
        self,
        token_ids: list[int],
        first_position: int,
        cache: DynamicCache,
        added: tuple[int, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Feed tokens; `added` is a layer and a tensor `[new, hidden]` to add to its input.

        Returns:
            Logits of the last token `[vocab]`, hidden states after the final norm `[new, hidden]` and
            post-RoPE queries `[full layers, Hq, new, D]`, times what makes 1 / sqrt(D) the factor of their logits.
        """
        positions = torch.arange(first_position, first_position + len(token_ids))[None]
        body = self.lm.model
        self.added = added
        hidden = body(
            input_ids=torch.tensor([token_ids]), position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        attentions = [layer.self_attn for layer in self.evicting]
        if self.has_latents:
            queries = torch.stack([absorbed(each) for each in attentions])
        else:
            queries = torch.cat([each.recorded_query * (each.scaling * each.head_dim**0.5) for each in attentions])
        return self.lm.lm_head(hidden[0, -1]), hidden[0], queries
