"""Base of the value-aware methods, which score a token by its contribution to the attention output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.errors import KVPolicyError
from ..core.needs import Need
from .base import Held, Policy, View, make_policy, policies_with_weights


@dataclass(frozen=True)
class ValueAware(Policy):
    """A method that reads values and uses the attention weights of another method.

    Attributes:
        base: the other method, with its default parameters.
    """

    base: str = "snapkv"

    def __post_init__(self) -> None:
        if self.base not in policies_with_weights():
            raise KVPolicyError(
                f"kv_policy_config: base={self.base!r} has no attention weights; choose one of: "
                f"{', '.join(policies_with_weights())}"
            )

    @property
    def needs(self) -> Need:  # type: ignore[override]
        """Inputs of the base, and values."""
        return make_policy(self.base).needs | Need.VALUES

    def base_weights(self, view: View) -> Tensor:
        """Return the attention weights of the base, float32 `[H, L]`."""
        weights = make_policy(self.base).weights(view)
        assert weights is not None
        return weights

    def base_weights_batch(self, held: Held) -> Tensor:
        """Return the attention weights of the base, float32 `[R, layers, H, N]`."""
        return make_policy(self.base).weights_batch(held)

    @property
    def is_batched(self) -> bool:
        """Whether the base is batched, too."""
        return super().is_batched and type(make_policy(self.base)).weights_batch is not Policy.weights_batch


def values_of(view: View) -> Tensor:
    """Return the values of a view, float32 `[H, L, D]`."""
    assert view.values is not None
    return view.values.float().transpose(0, 1)
