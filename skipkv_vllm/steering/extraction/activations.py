"""Make a vector from reasoning texts: the mean state before execution thoughts minus that before all others (SEAL)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...core.errors import KVPolicyError
from ..tables import split_tokens
from ..vectors import SteeringVector
from .checkpoints import Checkpoint
from .reasoning_texts import ReasoningText
from .thoughts import LABELS, KeywordSet, thoughts

if TYPE_CHECKING:
    from collections.abc import Iterator

METHOD = "mean difference of boundary states"
EXECUTION = LABELS.index("execution")


@dataclass(eq=False)
class ClassSums:
    """Hidden states at the boundaries of thoughts, summed by class. Texts alternate between two halves.

    Attributes:
        layers: the layers measured.
        sums: float64 `[2 halves, layers, 3 classes, hidden size]`, classes as in `LABELS`.
        counts: int64 `[2 halves, 3 classes]`.
        norms: float64 `[layers]`, sum of the norms of the states.
    """

    layers: tuple[int, ...]
    sums: Tensor
    counts: Tensor
    norms: Tensor

    @classmethod
    def zeros(cls, layers: Sequence[int], hidden_size: int) -> ClassSums:
        """Return empty sums."""
        classes = len(LABELS)
        return cls(
            tuple(layers),
            torch.zeros(2, len(layers), classes, hidden_size, dtype=torch.float64),
            torch.zeros(2, classes, dtype=torch.int64),
            torch.zeros(len(layers), dtype=torch.float64),
        )

    def add(self, half: int, states: Tensor, classes: Tensor) -> None:
        """Add the states of a text.

        Args:
            half: 0 or 1.
            states: `[layers, boundaries, hidden size]`, any dtype and device.
            classes: int64 `[boundaries]`, on the CPU.
        """
        states = states.to("cpu", torch.float64)
        self.sums[half].index_add_(1, classes, states)
        self.counts[half] += torch.bincount(classes, minlength=len(LABELS))
        self.norms += states.norm(dim=-1).sum(-1)

    def difference(self, layer: int, half: int | None = None) -> Tensor:
        """Return execution minus the rest, float64 `[hidden size]`; of one half of the texts or of all."""
        halves = slice(None) if half is None else slice(half, half + 1)
        sums, counts = self.sums[halves, self.layers.index(layer)].sum(0), self.counts[halves].sum(0)
        others = [i for i in range(len(LABELS)) if i != EXECUTION]
        return sums[EXECUTION] / counts[EXECUTION] - sums[others].sum(0) / counts[others].sum()

    def split_half_cosine(self, layer: int) -> float | None:
        """Return the cosine between the differences of the two halves; None if a half lacks a class."""
        one, other = (self.difference(layer, half) for half in (0, 1))
        cosine = float(one @ other / (one.norm() * other.norm()))
        return cosine if math.isfinite(cosine) else None

    def mean_norm(self, layer: int) -> float:
        """Return the mean norm of the states, as a scale for the norm of the vector."""
        return float(self.norms[self.layers.index(layer)] / self.counts.sum())

    def vector(self, layer: int, checkpoint: Checkpoint, keywords: KeywordSet) -> SteeringVector:
        """Make the vector of a layer.

        Raises:
            KVPolicyError: the difference is zero, e.g. at the first layer if every boundary is the same token.
        """
        values = self.difference(layer).float()
        if not values.any():
            raise KVPolicyError(f"layer {layer}: all thoughts begin in the same state; choose a later layer")
        counts = dict(zip(LABELS, self.counts.sum(0).tolist(), strict=True))
        return SteeringVector(
            values=values,
            layer=layer,
            num_layers=checkpoint.num_layers,
            base_model=checkpoint.name,
            method=METHOD,
            keyword_set=keywords.name,
            split_half_cosine=self.split_half_cosine(layer),
            tokenizer_sha=checkpoint.tokenizer_sha,
            **counts,
        )

    def check(self, least: int) -> None:
        """Raise `KVPolicyError` unless each side of the difference has at least `least` thoughts."""
        execution, *others = self.counts.sum(0).tolist()
        if min(execution, sum(others)) < least:
            raise KVPolicyError(
                f"the texts hold {execution} execution thoughts and {sum(others)} of reflection or transition; each "
                f"side needs at least {least} (--min-thoughts). Give more texts, or keywords that match them"
            )


def measure(
    checkpoint: Checkpoint,
    texts: Iterable[ReasoningText],
    layers: Sequence[int],
    keywords: KeywordSet,
    *,
    dtype: str = "float32",
    device: str | None = None,
) -> ClassSums:
    """Run a model over reasoning texts, one forward pass each, and sum its hidden states.

    Args:
        checkpoint: the model.
        texts: prompts and responses.
        layers: layers whose inputs are measured.
        keywords: keywords that classify the thoughts.
        dtype: dtype of the model; sums are float64.
        device: device of the model; None for a GPU if there is one.

    Raises:
        KVPolicyError: a layer that does not exist, a model without a list of decoder layers, a text without thoughts.
    """
    for layer in layers:
        checkpoint.check_layer(layer)
    tokenizer, splits = checkpoint.tokenizer, split_tokens(checkpoint.tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, decoder = _load(checkpoint, max(layers), dtype, device)
    sums = ClassSums.zeros(layers, checkpoint.hidden_size)
    for number, text in enumerate(texts):
        # The text of the prompt already contains the special tokens.
        prompt = tokenizer.encode(text.prompt, add_special_tokens=False)
        response = tokenizer.encode(text.response, add_special_tokens=False)
        labelled = [
            (thought.boundary, LABELS.index(label))
            for thought in thoughts(text.prompt, response, tokenizer, splits)
            if (label := keywords.label(thought.text)) is not None
        ]
        if not labelled:
            continue
        boundaries, classes = torch.tensor(labelled).T
        with _inputs(decoder, layers, len(prompt) + boundaries) as states, torch.inference_mode():
            model(input_ids=torch.tensor([prompt + response], device=device), use_cache=False)
        sums.add(number % 2, torch.stack([states[layer] for layer in layers]), classes)
    return sums


def _load(checkpoint: Checkpoint, last: int, dtype: str, device: str) -> tuple[Any, nn.ModuleList]:
    """Load the model up to a layer, without its head."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoint.name, dtype=getattr(torch, dtype)).eval()
    decoder = next((m for m in model.modules() if isinstance(getattr(m, "layers", None), nn.ModuleList)), None)
    if decoder is None or len(decoder.layers) != checkpoint.num_layers:
        raise KVPolicyError(
            f"{type(model).__name__} has no list of {checkpoint.num_layers} decoder layers named `layers`, as Qwen and "
            "Llama models have; its states cannot be read"
        )
    decoder.layers = decoder.layers[: last + 1]
    return model.to(device), decoder.layers


@contextmanager
def _inputs(decoder: nn.ModuleList, layers: Sequence[int], positions: Tensor) -> Iterator[dict[int, Tensor]]:
    """Collect the inputs of layers at positions: layer -> `[positions, hidden size]`."""
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            states[layer] = hidden[0, positions.to(hidden.device)]

        return hook

    handles = [decoder[layer].register_forward_pre_hook(keep(layer), with_kwargs=True) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
