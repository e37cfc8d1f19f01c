"""Train gates for the bundled model by distillation: which token counts how long (TRIM-KV, arXiv 2512.03324).

    python -m benchmarks.tiny_reasoner.train_gates

The model is frozen. In the student the logit of query t and key i gets `(t - i) * log beta_i`, so that a token fades as
its gate says. The gates are to leave the model's predictions as they are (forward KL to the model without gates, and
the next token), while what has not faded, `sum_i beta_i ** (t - i)`, stays within a capacity. Reads training problems
only; seeded, about three minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from skipkv_vllm import bundled_gates, bundled_model
from skipkv_vllm.gates import Gate, Gates

from .problems import SPLITS, make_problem
from .train import IGNORED, batch

ATTENTION = "gated"


class GateNetwork(nn.Module):
    """`logsigmoid(W2 act(W1 h + b1) + b2)`: hidden states `[..., E]` to `log beta` `[..., H]`.

    At first every token lasts: `b2` is large.
    """

    def __init__(self, hidden_size: int, width: int, num_kv_heads: int, act: nn.Module, bias: float) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, width)
        self.second = nn.Linear(width, num_kv_heads)
        self.act = act
        nn.init.normal_(self.second.weight, std=0.02)
        nn.init.constant_(self.second.bias, bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.logsigmoid(self.second(self.act(self.first(hidden))))

    def gate(self) -> Gate:
        """The weights for the file."""
        return Gate(*(p.detach() for p in (self.first.weight, self.first.bias, self.second.weight, self.second.bias)))


def _fading_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention, `[n, Hq, T, D]` each; keys fade by the module's `log_beta` `[n, T, H]` where it has one."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    if module.log_beta is not None:
        faded = module.log_beta.mT.repeat_interleave(groups, dim=1)[:, :, None] * _ages(length)
        logits = logits + faded
    logits = logits.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return (logits.softmax(-1) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


def _ages(length: int) -> Tensor:
    """t - i of query t and key i, 0 for keys to come: `[length, length]`."""
    order = torch.arange(length, dtype=torch.float32)
    return (order[:, None] - order).clamp(min=0)


AttentionInterface.register(ATTENTION, _fading_attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


class Student(nn.Module):
    """A frozen model with a gate in front of each attention block."""

    def __init__(self, model: PreTrainedModel, width: int, bias: float) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        config = model.config
        shape = (config.hidden_size, width, config.num_key_value_heads)
        layers = model.model.layers
        act = layers[0].mlp.act_fn
        self.gates = [GateNetwork(*shape, act, bias) for _ in layers]
        self._trained = nn.ModuleList(self.gates)
        self._is_gated = False
        for gate, layer in zip(self.gates, layers, strict=True):
            layer.self_attn.register_forward_pre_hook(
                lambda module, _, kwargs, gate=gate: self._before(module, kwargs["hidden_states"], gate),
                with_kwargs=True,
            )

    def _before(self, module: Any, hidden: Tensor, gate: GateNetwork) -> None:
        module.log_beta = gate(hidden) if self._is_gated else None

    def forward(self, ids: Tensor, *, gated: bool) -> tuple[Tensor, Tensor | None]:
        """Logits `[n, T, vocabulary]` of `ids` `[n, T]`, and with gates `log beta` `[layers, n, T, H]`."""
        self._is_gated = gated
        logits = self.model(input_ids=ids, use_cache=False).logits
        if not gated:
            return logits, None
        return logits, torch.stack([layer.self_attn.log_beta for layer in self.model.model.layers])


def over_capacity(log_beta: Tensor, capacity: int) -> Tensor:
    """By how much what has not faded exceeds the capacity.

    Args:
        log_beta: `[..., T, H]`.
        capacity: M, tokens.

    Returns:
        Mean of `max(0, sum_i beta_i ** (t - i) - M) / (t - M)` over the positions t and heads where it is positive; a
        share between 0 and about 1, and 0 where nothing exceeds it.
    """
    length = log_beta.shape[-2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    lasting = torch.where(seen, (log_beta.mT[..., None, :] * _ages(length)).exp(), 0.0).sum(-1)  # [..., H, T]
    excess = (lasting - capacity).clamp(min=0) / (torch.arange(length) - capacity).clamp(min=1)
    return excess.sum() / (excess > 0).sum().clamp(min=1)


class Losses(NamedTuple):
    """What the gates are trained on; each a scalar."""

    divergence: Tensor
    next_token: Tensor
    capacity: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, with weight 1 each as in the paper."""
        return self.divergence + self.next_token + self.capacity


def losses(student: Student, ids: Tensor, labels: Tensor, capacity: int) -> Losses:
    """Losses of a batch: token ids and labels `[n, T]`, `IGNORED` where there is no target."""
    with torch.no_grad():
        wanted, _ = student(ids, gated=False)
    logits, log_beta = student(ids, gated=True)
    assert log_beta is not None
    counted = labels[:, 1:] != IGNORED
    own = logits[:, :-1][counted].log_softmax(-1)
    target = wanted[:, :-1][counted].log_softmax(-1)
    return Losses(
        F.kl_div(own, target, reduction="batchmean", log_target=True),
        F.nll_loss(own, labels[:, 1:][counted]),
        over_capacity(log_beta, capacity),
    )


def batches(tokens: int, tokenizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Training problems, each once."""
    seed = SPLITS["train"]
    while True:
        ids, labels = batch(make_problem, seed, tokens, tokenizer)
        seed += len(ids)
        yield ids, labels


def train(student: Student, data: Iterator[tuple[Tensor, Tensor]], *, steps: int, lr: float, capacity: int) -> Losses:
    """Train the gates; the losses of the last step."""
    weights = [weight for gate in student.gates for weight in gate.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    for step, (ids, labels) in enumerate(bar := tqdm(itertools.islice(data, steps), total=steps, unit="step")):
        found = losses(student, ids, labels, capacity)
        optimizer.zero_grad()
        found.total.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        bar.set_postfix({name: f"{value.item():.4f}" for name, value in found._asdict().items()})
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--out", default=bundled_gates(), help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--width", type=int, default=32, help="units of a gate's hidden layer")
    parser.add_argument("--capacity", type=int, default=20, help="tokens that may last")
    parser.add_argument("--bias", type=float, default=6.0, help="initial logit of beta")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--tokens", type=int, default=1800, help="padded tokens per step")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation=ATTENTION)
    student = Student(model, args.width, args.bias)
    data = batches(args.tokens, tokenizer)
    last = train(student, data, steps=args.steps, lr=args.lr, capacity=args.capacity)
    told = {name: str(value) for name, value in vars(args).items() if name not in ("model", "out")}
    told |= {f"loss_{name}": f"{value.item():.4f}" for name, value in last._asdict().items()}
    made = {"method": "TRIM-KV, arXiv 2512.03324", "made_by": "python -m benchmarks.tiny_reasoner.train_gates"}
    made |= {"base_model": "tiny-reasoner", "data": "generated problems of the training split"}
    Gates([network.gate() for network in student.gates]).save(args.out, made | told)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
