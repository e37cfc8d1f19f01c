"""What workers collect for policies. `base.Signal` is the protocol; a new signal is a file here and a field below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .attention_mass import AttentionMass
from .base import ForwardOutput, Signal, Step
from .gates import TokenGates
from .queries import QueryRing
from .segments import SegmentSparsity
from .sentences import Sentences

__all__ = ["Signal", "Signals"]


@dataclass(frozen=True)
class Signals:
    """The signals of a worker; None for those that no policy of the server needs.

    Attributes:
        prepare: hook `prepare` of each signal that overrides it; a step calls only these.
        after_forward: hook `after_forward` of each signal that overrides it.
    """

    queries: QueryRing | None = None
    sentences: Sentences | None = None
    attention_mass: AttentionMass | None = None
    segments: SegmentSparsity | None = None
    gates: TokenGates | None = None
    prepare: tuple[Callable[[Step], None], ...] = field(init=False, repr=False)
    after_forward: tuple[Callable[[Step, ForwardOutput], None], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        every = (self.queries, self.sentences, self.attention_mass, self.segments, self.gates)
        object.__setattr__(self, "_present", tuple(signal for signal in every if signal is not None))
        for hook in ("prepare", "after_forward"):
            overriding = (each for each in self if getattr(type(each), hook) is not getattr(Signal, hook))
            object.__setattr__(self, hook, tuple(getattr(each, hook) for each in overriding))

    def __iter__(self) -> Iterator[Signal]:
        return iter(self._present)  # type: ignore[attr-defined]

    @property
    def nbytes(self) -> int:
        """Device memory of all signals, see `Signal.nbytes`."""
        return sum(signal.nbytes for signal in self)
