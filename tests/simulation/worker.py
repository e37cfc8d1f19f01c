"""The worker under test. Only this file builds the runtime and reads its private attributes."""

from __future__ import annotations

import torch
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import ACCUMULATED, Need
from skipkv_vllm.policies import Policy
from skipkv_vllm.worker.cache import KVCache
from skipkv_vllm.worker.lookahead import Decoder
from skipkv_vllm.worker.ranks import ALONE
from skipkv_vllm.worker.requests import ManagedRequest, Rows
from skipkv_vllm.worker.runtime import EvictionRuntime
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.signals.attention_mass import AttentionMass
from skipkv_vllm.worker.signals.gates import TokenGates
from skipkv_vllm.worker.signals.queries import QueryRing
from skipkv_vllm.worker.signals.segments import SegmentSparsity
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from skipkv_vllm.worker.signals.sentences import Sentences
from tests.simulation.model import CPU, DIM, HIDDEN, KV_HEADS, Q_HEADS, TABLES, VOCABULARY, FakeAttention, FakeBlock
from tests.simulation.pool import Pool
from tests.simulation.request import Running


class Worker:
    """An `EvictionRuntime` and the layers that its signals hook into.

    Args:
        config: the server's policy.
        pool: the KV cache.
        num_rows: requests that can run at once.
        max_length: tokens of the longest request.
        max_tokens: tokens of the largest step.
        decoder: computes tokens ahead, if the policy needs their queries.
    """

    def __init__(
        self,
        config: KVPolicyConfig,
        pool: Pool,
        *,
        num_rows: int,
        max_length: int,
        max_tokens: int,
        decoder: Decoder | None = None,
    ) -> None:
        num_layers, needs = len(pool.layers), config.needs
        self.attention = [FakeAttention() for _ in range(num_layers)]
        self.attention_blocks = [FakeBlock() for _ in range(num_layers)]
        ring = tracker = gates = None
        if needs & Need.QUERIES:
            ring = QueryRing(
                num_layers=num_layers,
                num_rows=num_rows,
                window=config.kv_window,
                num_kept=config.num_queries,
                num_heads=Q_HEADS,
                head_size=DIM,
                max_tokens=max_tokens,
                dtype=torch.float32,
                device=CPU,
            )
            for i, attention in enumerate(self.attention):
                ring.attach(i, attention)
        if needs & Need.SENTENCES:
            tracker = SentenceTracker(
                TABLES,
                config.policy.sentence_options,
                num_rows=num_rows,
                max_length=max_length,
                hidden_size=HIDDEN if needs & Need.HIDDEN else 0,
                vocab_size=VOCABULARY,
                dtype=torch.float32,
                device=CPU,
                keeps_text=bool(needs & Need.RECURRENCE),
            )
        if config.gates is not None:
            gates = TokenGates(
                config.gates.layers,
                first_head=0,
                num_heads=KV_HEADS,
                activation="silu",
                max_tokens=max_tokens,
                dtype=torch.float32,
                device=CPU,
            )
            gates.attach(self.attention_blocks)
        signals = Signals(
            ring,
            Sentences(tracker) if tracker is not None else None,
            AttentionMass(ring, config.kv_buffer, needs) if ring is not None and needs & ACCUMULATED else None,
            SegmentSparsity(ring, config.kv_window, ALONE) if ring is not None and needs & Need.SEGMENTS else None,
            gates,
        )
        self.runtime = EvictionRuntime(config, Rows(num_rows), signals, CPU)
        self.runtime.bind_cache(pool.cache, pool.block_size, decoder=decoder)

    @property
    def cache(self) -> KVCache:
        """The runtime's view of the KV cache."""
        assert self.runtime._compactor is not None
        return self.runtime._compactor.cache

    @property
    def free_rows(self) -> list[int]:
        """Rows without a request; the list itself, which tests may damage."""
        return self.runtime._rows._free

    @property
    def num_requests(self) -> int:
        """Managed requests."""
        return len(self.runtime._requests)

    def request(self, name: str) -> ManagedRequest:
        """Return the runtime's record of a managed request."""
        return self.runtime._requests[name]

    def policy_of(self, name: str) -> Policy:
        """Return the policy of a request, the server's where the runtime does not know the request."""
        request = self.runtime._requests.get(name)
        return self.runtime.config.policy if request is None else request.policy

    def positions(self, request: Running) -> Tensor:
        """Return positions by slot, `[layers, H, resident]`, as the runtime has them."""
        managed = self.runtime._requests.get(request.name)
        if managed is None:
            return torch.arange(request.num_resident).expand(len(self.attention), KV_HEADS, -1)
        return self.cache.positions_of(request.blocks, request.num_resident, managed.num_placed, request.num_evicted)

    def gate_outputs(self, request: Running) -> Tensor | None:
        """Return the stored output of the gates by slot, `[layers, H, resident]`; None if there is none.

        It moves with the tokens of requests that read it, and lies with those of others until they are compacted.
        """
        gates, managed = self.runtime.signals.gates, self.runtime._requests.get(request.name)
        if gates is None or (request.num_evicted and not managed.needs & Need.GATES):
            return None
        return gates.by_slot(self.cache.table([request.blocks]), request.num_resident)[0]
