"""Time a whole compaction of every method: `python -m benchmarks.kernels.methods`.

A compaction is everything that the worker does for a request that has reached its bound: it accumulates the queries
that are due (with methods that accumulate), reads the signals, scores, selects, moves, and lets the signals follow.
The methods take turns, so a disturbance affects all of them, and each is compared with the default method.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import ACCUMULATED, NUM_ACCUMULATED, Need
from skipkv_vllm.core.orders import Accumulation, Compaction, Started
from skipkv_vllm.ops.paging import Layout, PagedCache
from skipkv_vllm.policies import Policy, make_policy, policy_names
from skipkv_vllm.policies.gates import Gate, Gates
from skipkv_vllm.sentences import SentenceTables
from skipkv_vllm.worker.batch import NEVER, BatchRows, RowTable, StepBatch
from skipkv_vllm.worker.cache import KVCache
from skipkv_vllm.worker.compaction import Compactor
from skipkv_vllm.worker.ranks import ALONE
from skipkv_vllm.worker.requests import Job, ManagedRequest, Reading
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.signals.attention_mass import AttentionMass
from skipkv_vllm.worker.signals.base import ForwardOutput, Step
from skipkv_vllm.worker.signals.gates import TokenGates
from skipkv_vllm.worker.signals.queries import QueryRing
from skipkv_vllm.worker.signals.segments import SegmentSparsity
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from skipkv_vllm.worker.signals.sentences import Sentences

from .clocks import CpuClock, Work

LENGTHS = (1152, 2176)
DEFAULT = "skipkv"
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "skipkv, paper": ("skipkv", {"compat": "paper"}),
    "obcache, value": ("obcache", {"form": "value"}),
    "obcache, key": ("obcache", {"form": "key"}),
    "caote, fast": ("caote", {"form": "fast"}),
    "caote on h2o": ("caote", {"base": "h2o"}),
    "manifoldkv, windowed": ("manifoldkv", {"centroid_window": 256}),
}
"""Name of a row -> policy and its parameters, besides every method with its defaults."""

DOT, VOCABULARY, HIDDEN = 9, 1000, 64
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the run.

    Attributes:
        length: tokens held before a compaction.
        buffer: tokens that a compaction frees.
        written: tokens of the request so far, in units of `length`.
        layers, heads, query_heads, dim, window: of the model.
        page_size, layout, dtype: of the cache.
    """

    length: int = LENGTHS[0]
    buffer: int = 128
    written: int = 2
    layers: int = 8
    heads: int = 8
    query_heads: int = 32
    dim: int = 128
    window: int = 8
    page_size: int = 32
    layout: str = "vec"
    dtype: str = "float32"

    @property
    def keep(self) -> int:
        """Tokens held after a compaction."""
        return self.length - self.buffer

    @property
    def num_logical(self) -> int:
        """Tokens written so far."""
        return self.length * self.written


class _Attention:
    """Stands in for the attention implementation of a layer."""

    def forward(self, layer: object, query: torch.Tensor) -> torch.Tensor:
        return query


class CompactionOf:
    """The compaction of one request by a method, which can be repeated.

    Args:
        name: the method.
        parameters: its parameters.
        sizes: of the run.
    """

    def __init__(self, name: str, parameters: dict[str, object], sizes: Sizes) -> None:
        self.sizes = sizes
        values = {"kv_policy": name, "kv_policy_config": parameters, "kv_protect_prompt": False}
        values |= {"kv_budget": sizes.keep, "kv_buffer": sizes.buffer, "kv_window": sizes.window}
        self._config = KVPolicyConfig.parse(values)
        self._generator = torch.Generator().manual_seed(sizes.length)
        pages = -(-sizes.length // sizes.page_size)
        shape = (pages + 1, sizes.heads, sizes.page_size, 2 * sizes.dim)
        layout, dtype = Layout[sizes.layout.upper()], getattr(torch, sizes.dtype)
        caches = [torch.randn(shape, generator=self._generator).to(dtype) for _ in range(sizes.layers)]
        self._cache = KVCache(PagedCache.of(caches, layout), sizes.page_size)
        self._blocks = (torch.randperm(pages, generator=self._generator) + 1).tolist()
        self._signals = self._build_signals(dtype)
        for signal in self._signals:
            signal.bind_cache(self._cache)
        self._compactor = Compactor(self._config, self._cache, self._signals)
        policy, needs = self._config.policy, self._config.needs
        self._request = ManagedRequest(0, policy, needs, num_prompt=64, num_placed=sizes.keep)
        self._write_tokens()
        self._hold_positions()
        self._positions = self._cache.sidecar.clone()

    def __call__(self) -> None:
        """Compact the request, which then is as before except for the order of its tokens."""
        sizes = self.sizes
        self._cache.sidecar.copy_(self._positions)
        if self._request.needs & ACCUMULATED:
            self._accumulate(sizes.num_logical, min(NUM_ACCUMULATED, sizes.buffer))
        keep = -(-sizes.keep // sizes.page_size)
        order = Compaction(
            "a", sizes.num_logical, sizes.length, sizes.keep, self._blocks, self._blocks[:keep], ordinal=0
        )
        self._compactor.run([Job(order, self._request)])

    def _accumulate(self, num_logical: int, count: int) -> None:
        order = Accumulation("a", num_logical, self.sizes.length, count, self._blocks)
        for signal in self._signals:
            signal.accumulate([Reading(order, self._request)])

    def _build_signals(self, dtype: torch.dtype) -> Signals:
        sizes, needs, device = self.sizes, self._config.needs, self._cache.device
        ring = tracker = gates = None
        if needs & Need.QUERIES:
            ring = QueryRing(
                num_layers=sizes.layers,
                num_rows=1,
                window=sizes.window,
                num_kept=self._config.num_queries,
                num_heads=sizes.query_heads,
                head_size=sizes.dim,
                max_tokens=sizes.num_logical,
                dtype=dtype,
                device=device,
            )
        if needs & Need.SENTENCES:
            tracker = SentenceTracker(
                TABLES,
                self._config.policy.sentence_options,
                num_rows=1,
                max_length=sizes.num_logical,
                hidden_size=HIDDEN if needs & Need.HIDDEN else 0,
                vocab_size=VOCABULARY,
                dtype=dtype,
                device=device,
                keeps_text=bool(needs & Need.RECURRENCE),
            )
        if self._config.gates is not None:
            gates = TokenGates(
                self._config.gates.layers,
                first_head=0,
                num_heads=sizes.heads,
                activation="silu",
                max_tokens=sizes.num_logical,
                dtype=dtype,
                device=device,
            )
        return Signals(
            ring,
            None if tracker is None else Sentences(tracker),
            AttentionMass(ring, sizes.buffer, needs) if ring is not None and needs & ACCUMULATED else None,
            SegmentSparsity(ring, sizes.window, ALONE) if ring is not None and needs & Need.SEGMENTS else None,
            gates,
        )

    def _write_tokens(self) -> None:
        """Let the signals see the tokens of the request, as if one step had computed all of them."""
        sizes, signals = self.sizes, self._signals
        started = Started("a", self._config.kv_policy, 64, 0, 0)
        for signal in signals:
            signal.start(self._request, started)
        table, device = RowTable(1), self._cache.device
        table.is_recorded[0], table.first_tracked[0] = True, 0 if self._request.needs & Need.SENTENCES else NEVER
        number = sizes.num_logical
        batch = StepBatch(["a"], np.array([number]), np.array([0]), number)
        step = Step(batch, BatchRows(["a"], np.zeros(1, dtype=np.int64), table, device), True)
        for prepare in signals.prepare:
            prepare(step)
        if signals.queries is not None:
            for i in range(sizes.layers):
                layer = _Attention()
                signals.queries.attach(i, layer)
                shape = (number, sizes.query_heads, sizes.dim)
                layer.forward(None, torch.randn(shape, generator=self._generator).to(getattr(torch, sizes.dtype)))
        tokens = torch.randint(10, VOCABULARY, (number,), generator=self._generator)
        tokens[24::25] = DOT
        tokens[: number // 4] = tokens[number // 4 : 2 * (number // 4)]  # a part that later text repeats
        hidden = torch.randn(number, HIDDEN, generator=self._generator).to(getattr(torch, sizes.dtype))
        slots = torch.arange(number) % (sizes.length - sizes.page_size)
        for after_forward in signals.after_forward:
            after_forward(step, ForwardOutput(tokens, slots, hidden))
        if signals.segments is not None:
            length = self._request.policy.segment_options.length
            for end in range(length, number, length):
                self._accumulate(end, sizes.window)

    def _hold_positions(self) -> None:
        """Let each head hold tokens of its own, a quarter of them out of order."""
        sizes = self.sizes
        oldest = sizes.num_logical - sizes.buffer
        slot = torch.arange(sizes.keep)
        page, offset = torch.tensor(self._blocks)[slot // sizes.page_size], slot % sizes.page_size
        for layer in self._cache.sidecar:
            for head in range(sizes.heads):
                held = torch.randperm(oldest, generator=self._generator)[: sizes.keep].sort().values
                moved = torch.randperm(sizes.keep, generator=self._generator)[: sizes.keep // 4]
                held[moved] = held[moved.sort().values]
                layer[page, head, offset] = held.int()


def _gates_file(folder: str, sizes: Sizes) -> str:
    """Write random gates for a model of these sizes and return their path."""
    shapes = ((16, HIDDEN), (16,), (sizes.heads, 16), (sizes.heads,))
    gates = Gates([Gate(*(torch.randn(shape) for shape in shapes)) for _ in range(sizes.layers)])
    gates.save(f"{folder}/gates.safetensors", {})
    return f"{folder}/gates.safetensors"


def rows() -> dict[str, tuple[str, dict[str, object]]]:
    """Return what the table compares: name -> policy and its parameters; the default method comes first."""
    names = [name for name in policy_names() if name not in ("full", DEFAULT)]
    return {DEFAULT: (DEFAULT, {}), **{name: (name, {}) for name in names}, **VARIANTS}


def bench(sizes: Sizes, only: Sequence[str], repeats: int, seconds: float) -> dict[str, float]:
    """Return the median time of a compaction of each method, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        works: dict[str, Work] = {}
        for row, (name, parameters) in rows().items():
            if row == DEFAULT or not only or row in only:
                needs_gates = bool(_needs(name) & Need.GATES)
                extra = {"gates": _gates_file(folder, sizes)} if needs_gates else {}
                works[row] = CompactionOf(name, {**parameters, **extra}, sizes)
        timed = CpuClock().interleaved(works, repeats, seconds)
        return {name: median(times) for name, times in timed.items()}


def _needs(name: str) -> Need:
    policy: Policy = make_policy(name)
    return policy.needs


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status, 1 if a method takes more than `--most` times as long as the default."""
    args = _parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    keys = ("buffer", "layers", "heads", "query_heads", "dim", "window", "page_size", "layout", "dtype")
    found: dict[int, dict[str, float]] = {}
    for length in args.lengths:
        sizes = Sizes(length, **{key: getattr(args, key) for key in keys})
        found[length] = bench(sizes, args.methods, args.repeats, args.seconds)
    print(table(found))
    slow = [
        f"{name} at {length}: {times[name] / times[DEFAULT]:.1f}"
        for length, times in found.items()
        for name in times
        if times[name] > args.most * times[DEFAULT]
    ]
    for each in slow:
        print(f"slower than {args.most:g} times {DEFAULT}: {each}", file=sys.stderr)
    return 1 if slow else 0


def table(found: dict[int, dict[str, float]]) -> str:
    """Format times in seconds, by tokens held and by method, as a Markdown table."""
    heads = [f"{length} tokens, ms | times {DEFAULT}" for length in found]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---|---|" * len(found)]
    for name in next(iter(found.values())):
        cells = [f"{times[name] * 1e3:.1f} | {times[name] / times[DEFAULT]:.2f}" for times in found.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    defaults: dict[str, Any] = {field: getattr(Sizes, field) for field in Sizes.__dataclass_fields__}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.methods",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("methods", nargs="*", help="only these, and the default method")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="N", help="tokens held")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layout", default=defaults["layout"], choices=["rows", "vec", "amx"])
    parser.add_argument("--dtype", default=defaults["dtype"], choices=["float32", "bfloat16", "float16"])
    for name in ("buffer", "layers", "heads", "query_heads", "dim", "window", "page_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--repeats", type=int, default=7, help="rounds at least")
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds for each length")
    parser.add_argument("--most", type=float, default=3.0, help="bar: times the default method")
    return parser


if __name__ == "__main__":
    sys.exit(main())
