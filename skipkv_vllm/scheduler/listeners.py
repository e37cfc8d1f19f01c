"""The listeners of a scheduler: steering, reports to clients, traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import CONFIG_KEY, KVPolicyConfig
from ..core.auxiliary import auxiliary
from ..core.orders import Compaction, Started, Swap
from ..steering.controller import SteeringController
from ..trace.collector import TraceCollector
from .requests import RequestEvictions, RequestListener, RequestRecord, Text
from .stats import EvictionStats


class SteeringListener(RequestListener):
    """Sets where the steering of a request starts and counts its thoughts at its end.

    It comes before the listeners that report the thoughts.
    """

    def __init__(self, controller: SteeringController, config: KVPolicyConfig) -> None:
        self._controller = controller
        self._vectors = list(config.kv_steering_vectors)

    def arrived(self, request: RequestRecord, prompt: Sequence[int]) -> None:
        """Set where and how the request is steered, if it is."""
        resolved = request.resolved
        if resolved.vector is not None:
            number = 1 + self._vectors.index(resolved.vector)
            prompt = _with_placeholders(prompt, resolved.num_prompt)
            request.steering = self._controller.start(request.request_id, prompt, number, resolved.strength)

    def finished(self, request: RequestRecord, text: Text) -> None:
        """Count its thoughts."""
        start = request.steering
        if start is None:
            return
        with auxiliary("report on steering"):
            token_ids = [*_with_placeholders(text.prompt, request.resolved.num_prompt), *text.output]
            # The model never read the token sampled last.
            read = token_ids[: max(start.first, len(token_ids) - 1)]
            request.thoughts = self._controller.finish(start, read)


class ClientReports(RequestListener):
    """Counts the evictions of each request for its client; see `client_report`."""

    def started(self, request: RequestRecord, order: Started) -> None:
        """Start counting anew; a preempted request lost all its KV."""
        before = request.evictions
        request.evictions = RequestEvictions(order.policy, lives=1 if before is None else before.lives + 1)

    def compacted(self, request: RequestRecord, order: Compaction) -> None:
        """Count a compaction."""
        assert request.evictions is not None
        request.evictions.compactions += 1
        request.evictions.evicted_tokens += order.num_resident - order.num_keep


class TraceListener(RequestListener):
    """Passes orders and finished texts to the collector of traces.

    Attributes:
        collector: the collector.
    """

    def __init__(self, collector: TraceCollector, stats: EvictionStats) -> None:
        self.collector, self._stats = collector, stats

    def started(self, request: RequestRecord, order: Started) -> None:
        """Note a start."""
        self.collector.sent([], [order])

    def compacted(self, request: RequestRecord, order: Compaction) -> None:
        """Note a compaction."""
        self.collector.sent([order], [])

    def swapped(self, request: RequestRecord, order: Swap) -> None:
        """Note a swap."""
        self.collector.sent([order], [])

    def finished(self, request: RequestRecord, text: Text) -> None:
        """Have the trace written."""
        self.collector.finish(request.request_id, list(text.prompt), list(text.output), steering_report(request))

    def before_report(self) -> None:
        """Count the traces that were dropped since the last report."""
        self._stats.traces_dropped(self.collector.take_dropped())

    def idle(self) -> None:
        """Wait a moment for the last traces."""
        self.collector.settle()

    def close(self) -> None:
        """Write the last traces and remove what is left of others."""
        with auxiliary("finish the traces"):
            self.collector.close()


def steering_report(request: RequestRecord) -> dict[str, Any] | None:
    """Return the report on a steered request that ended; None for any other request."""
    if request.steering is None or request.thoughts is None:
        return None
    strength = request.steering.strength
    vector = {"vector": request.resolved.vector, "alpha0": strength.alpha0, "gamma": strength.gamma}
    return vector | request.thoughts._asdict()


def client_report(params: dict[str, Any] | None, request: RequestRecord) -> dict[str, Any] | None:
    """Add the report on a request to its `kv_transfer_params`, which vLLM hands to the client as they are."""
    evictions, steering = request.evictions, steering_report(request)
    if evictions is None and steering is None:
        return params
    # `asdict` copies deeply, and for a request with a stop string this runs in every step.
    report = {"policy": "full"} if evictions is None else dict(vars(evictions))
    return (params or {}) | {CONFIG_KEY: report | ({} if steering is None else {"steering": steering})}


def _with_placeholders(prompt: Sequence[int], num_prompt: int) -> Sequence[int]:
    """Return the prompt; zeros if it was given as embeddings."""
    return prompt or [0] * num_prompt
