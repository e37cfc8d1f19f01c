"""Properties of a checkpoint that steering needs; read from its configuration and tokenizer, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from ...core.errors import KVPolicyError
from ..vectors import tokenizer_digest


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on the hub or in a folder.

    Attributes:
        name: as given.
        hidden_size, num_layers: width and depth of the text model.
        tokenizer: the Hugging Face tokenizer.
        tokenizer_sha: see `tokenizer_digest`.
    """

    name: str
    hidden_size: int
    num_layers: int
    tokenizer: Any
    tokenizer_sha: str

    def check_layer(self, layer: int) -> None:
        """Raise `KVPolicyError` unless the layer exists."""
        if not 0 <= layer < self.num_layers:
            raise KVPolicyError(
                f"layer={layer} is out of range: {self.name} has {self.num_layers} layers; "
                f"allowed: 0 to {self.num_layers - 1}"
            )


def open_checkpoint(name: str) -> Checkpoint:
    """Read the properties of a checkpoint.

    Raises:
        KVPolicyError: it does not exist, or is not a text model.
    """
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise KVPolicyError(
            f"model={name!r} cannot be opened ({reason}); give the folder of a checkpoint or its name on the hub"
        ) from None
    hidden_size, num_layers = (getattr(config, key, None) for key in ("hidden_size", "num_hidden_layers"))
    if not isinstance(hidden_size, int) or not isinstance(num_layers, int):
        raise KVPolicyError(
            f"the configuration of {name!r} lacks hidden_size or num_hidden_layers; it cannot be steered"
        )
    return Checkpoint(name, hidden_size, num_layers, tokenizer, tokenizer_digest(tokenizer))
