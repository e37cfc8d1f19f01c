"""Ranks that share a model keep what one worker would keep: a pipeline of two unequal stages, each two ranks wide."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.core.needs import ACCUMULATED, Need
from skipkv_vllm.core.orders import Accumulation, Compaction
from skipkv_vllm.ops.paging import Layout, PagedCache
from skipkv_vllm.sentences import SentenceTables
from skipkv_vllm.worker import cache as cache_module
from skipkv_vllm.worker.cache import KVCache
from skipkv_vllm.worker.compaction import Compactor
from skipkv_vllm.worker.ranks import ALONE, Ranks
from skipkv_vllm.worker.requests import Job, ManagedRequest, Reading
from skipkv_vllm.worker.signals import Signals
from skipkv_vllm.worker.signals.attention_mass import AttentionMass
from skipkv_vllm.worker.signals.queries import QueryRing
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker, TrackedTokens
from skipkv_vllm.worker.signals.sentences import Sentences

LAYERS, HEADS, GROUP, DIM, HIDDEN = 4, 4, 2, 8, 6
STAGES, WIDTH = 2, 2
BOUNDS = (0, 1, LAYERS)
"""First layer of each stage, and the number of layers."""
PAGE, WINDOW = 4, 4
LENGTHS, KEEP = (48, 43), (20, 24)
DOT = 9
TABLES = SentenceTables(frozenset({DOT}), ((8,),), True, "max")
PARAMETERS = {"paper": {"compat": "paper"}, "without sentences": {"sentence_weight": 0.0}}
"""Other parameters of `skipkv`: the paper's rule, and without sentences."""
CASES = [
    *((policy, "head") for policy in ("random", "rkv", "h2o", "skipkv", "paper")),
    *((policy, "sentence") for policy in ("rkv", "h2o", "skipkv", "paper")),
]
CPU = torch.device("cpu")


class FakeAttention:
    def forward(self, layer: object, query: Tensor) -> Tensor:
        return query


def kept(policy: str, granularity: str, layers: slice, heads: slice, ranks: Ranks, *, is_last: bool) -> list[Tensor]:
    """Return the positions that a worker with these layers and heads keeps: `[layers, H, keep]` for each request."""
    generator = torch.Generator().manual_seed(7)

    def whole(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    config = KVPolicyConfig(
        kv_policy="skipkv" if policy in PARAMETERS else policy,
        kv_policy_config=PARAMETERS.get(policy, {}),
        kv_budget=16,
        kv_window=WINDOW,
        kv_granularity=granularity,
        kv_protect_prompt=False,
    )
    needs = config.needs
    blocks = [-(-length // PAGE) for length in LENGTHS]
    cells, total = whole(LAYERS, 1 + sum(blocks), HEADS, PAGE, 2 * DIM), sum(LENGTHS)
    queries = whole(LAYERS, total, HEADS, GROUP, DIM)[layers, :, heads].flatten(2, 3)
    topics, noise = whole(3, HIDDEN), 0.05 * whole(total, HIDDEN)
    caches = [cell.contiguous() for cell in cells[layers, :, heads]]
    num_layers, num_heads = len(caches), caches[0].shape[1]
    counts = np.array(LENGTHS, dtype=np.int64)
    ring = tracker = None
    if needs & Need.QUERIES:
        ring = QueryRing(
            num_layers=num_layers,
            num_rows=2,
            window=WINDOW,
            num_kept=config.num_queries,
            num_heads=num_heads * GROUP,
            head_size=DIM,
            max_tokens=total,
            dtype=torch.float32,
            device=CPU,
        )
        ring.place(np.array([0, 1]), counts, np.zeros(2, dtype=np.int64), total)
        for i in range(num_layers):
            impl = FakeAttention()
            ring.attach(i, impl)
            impl.forward(None, queries[i])
    if needs & Need.SENTENCES and is_last:
        size = HIDDEN if needs & Need.HIDDEN else 0
        tracker = SentenceTracker(
            TABLES,
            config.policy.sentence_options,
            num_rows=2,
            max_length=64,
            hidden_size=size,
            vocab_size=16,
            dtype=torch.float32,
            device=CPU,
            keeps_text=bool(needs & Need.RECURRENCE),
        )
        # Sentences of five tokens; every third one has a similar embedding, and two repeat the words of two before.
        place = torch.arange(total)
        tokens = torch.where(place % 5 == 4, DOT, torch.randint(8, (total,), generator=generator))
        for start in (0, LENGTHS[0]):
            tokens[start + 25 : start + 35] = tokens[start + 5 : start + 15]
        spans = torch.tensor([[0, 1], [0, LENGTHS[0]], LENGTHS, [0, 0]])
        for slot in (0, 1):
            tracker.reset(slot, 0)
        tracker.update(TrackedTokens(tokens, spans, total, topics[place // 5 % 3] + noise if size else None))
    mass = AttentionMass(ring, config.kv_buffer, needs) if ring is not None and needs & ACCUMULATED else None
    sentences = Sentences(tracker, ranks) if needs & Need.SENTENCES else None
    cache = KVCache(PagedCache.of(caches, Layout.ROWS), PAGE, most_pairs=ranks.most_pairs)
    signals = Signals(ring, sentences, mass)
    for signal in signals:
        signal.bind_cache(cache)
    compactor = Compactor(config, cache, signals, ranks)
    jobs, looks, first = [], [], 1
    for slot, (length, keep, number) in enumerate(zip(LENGTHS, KEEP, blocks, strict=True)):
        pages = list(range(first, first + number))
        first += number
        order = Compaction(str(slot), length, length, keep, pages, pages[: keep // PAGE], 0)
        jobs.append(Job(order, ManagedRequest(slot, config.policy, needs)))
        number_seen = min(length, config.num_queries)
        looks.append(Reading(Accumulation(order.request_id, length, length, number_seen, pages), jobs[-1].request))
    if mass is not None:
        mass.accumulate(looks)
    compactor.run(jobs)
    result = []
    for order, _ in jobs:
        held = cache.positions_of(order.target_blocks, order.num_keep, order.num_keep, 0)
        result.append(held.sort(dim=-1).values)
    return result


def one_rank(rank: int, folder: str) -> None:
    """Run all cases as one worker in its own process, and write the survivors to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=STAGES * WIDTH)
    stage, place = divmod(rank, WIDTH)
    layers, heads = slice(BOUNDS[stage], BOUNDS[stage + 1]), HEADS // WIDTH
    numbers, most_pairs = tuple(range(LAYERS)[layers]), (LAYERS - 1) * heads
    # The longer stage has room for one request at a time, and the shorter one would have for both.
    cache_module.TEMPORARY_BYTES = cache_module.SLOT_BYTES * most_pairs * (LENGTHS[0] + WINDOW * GROUP)
    ranks = Ranks(LAYERS * HEADS, most_pairs, numbers, place * heads, STAGES, dist.group.WORLD, (STAGES - 1) * WIDTH)
    where = layers, slice(place * heads, (place + 1) * heads)
    results = [kept(*case, *where, ranks, is_last=stage == STAGES - 1) for case in CASES]
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Tensor]]]:
    """Return the survivors of every rank by rank and case."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=one_rank, args=(rank, folder)) for rank in range(STAGES * WIDTH)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(STAGES * WIDTH)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_keep_what_one_worker_keeps(case: tuple[str, str], by_rank: list[list[list[Tensor]]]) -> None:
    alone = kept(*case, slice(None), slice(None), ALONE, is_last=True)
    number = CASES.index(case)
    for request, expected in enumerate(alone):
        stages = [
            torch.cat([by_rank[stage * WIDTH + place][number][request] for place in range(WIDTH)], dim=1)
            for stage in range(STAGES)
        ]
        assert torch.equal(torch.cat(stages), expected)
        rows = expected.flatten(0, 1).unique(dim=0)
        # If all heads chose alike, the test could not tell one rank's choice from another's.
        assert len(rows) == 1 if case[1] == "sentence" else len(rows) > LAYERS * HEADS / 2


def test_sentence_penalties_decide() -> None:
    """The message of the last stage matters: without repeats other tokens would stay."""
    for policies in (("paper", "rkv"), ("skipkv", "without sentences")):
        for granularity in ("head", "sentence"):
            one, other = (
                kept(policy, granularity, slice(None), slice(None), ALONE, is_last=True)[0] for policy in policies
            )
            assert not torch.equal(one, other)
