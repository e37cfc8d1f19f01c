"""`trimkv`: learned gates predict how long a token will matter (TRIM-KV, Bui et al., arXiv 2512.03324)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.errors import KVPolicyError
from ..core.needs import Need
from .base import About, Held, Policy, View, register_policy


@register_policy
@dataclass(frozen=True)
class TrimKV(Policy):
    """`(t + 1 - p) * log beta`, the logarithm of a token's remaining weight for the next query.

    p is the token's position, t the newest position, and `log beta` the output of the layer's gate when the token was
    written.

    Attributes:
        gates: file of the model's gates, see `skipkv_vllm.policies.gates`.
    """

    name: ClassVar[str] = "trimkv"
    about: ClassVar[About] = About(
        "TRIM-KV",
        "2512.03324",
        "O(L); a gate of width 512 (published) or less at every token",
        "pins the newest W tokens; its code counts one step more than its formula, which this follows",
        training="gates",
    )
    needs: ClassVar[Need] = Need.GATES

    gates: str = ""

    @property
    def gates_file(self) -> str:
        return self.gates

    def check_complete(self) -> None:
        if not self.gates:
            raise KVPolicyError(
                f"kv_policy={self.name!r} needs the gates of the model that is served; start the server with "
                f'--kv-policy {self.name} --kv-policy-config \'{{"gates": "/path/to/gates.safetensors"}}\''
            )

    def score(self, view: View) -> Tensor:
        assert view.gates is not None
        return (view.positions[:, -1:] + 1 - view.positions) * view.gates

    def score_batch(self, held: Held) -> Tensor:
        assert held.gates is not None
        return (held.num_logical - held.positions) * held.gates
