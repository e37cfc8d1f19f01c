"""Hit rates of the prefix cache under LRU, Guard and the best possible eviction, on vLLM's own block pool.

    python -m benchmarks.prefix_eviction

Traces: `zipf` asks for documents by Zipf's law; `scan` asks for all of them in turn, a few more than fit, the worst
case of LRU; `shift` is Zipf with other favourites every 500 requests; in `chat` conversations grow by a page a turn.
Belady's rule, which knows the future, evicts the page that is asked for last.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id

from skipkv_vllm.integration.free_queue import GuardQueue

from .results.pages import publish
from .results.provenance import record

Trace = list[list[str]]
"""Of each request the pages of its prompt, in order."""


def document(number: int, num_pages: int) -> list[str]:
    """The pages of a document."""
    return [f"{number}/{page}" for page in range(num_pages)]


def zipf(args: argparse.Namespace, shift: int = 0) -> Trace:
    """Documents by Zipf's law; every `shift` requests their ranks are drawn anew."""
    chance = random.Random(args.seed)
    weights = [1 / (rank + 1) ** args.exponent for rank in range(args.documents)]
    ranks, trace = list(range(args.documents)), []
    for i in range(args.requests):
        if shift and i % shift == 0:
            chance.shuffle(ranks)
        trace.append(document(chance.choices(ranks, weights)[0], args.pages))
    return trace


def scan(args: argparse.Namespace) -> Trace:
    """A tenth more documents than fit, in turn."""
    number = args.pool * 11 // 10 // args.pages
    return [document(i % number, args.pages) for i in range(args.requests)]


def chat(args: argparse.Namespace) -> Trace:
    """Conversations in random order, each of which grows by a page a turn up to 20."""
    chance = random.Random(args.seed)
    turns = dict.fromkeys(range(args.documents // 4), 0)
    trace = []
    for _ in range(args.requests):
        number = chance.choice(list(turns))
        turns[number] = turns[number] % 20 + 1
        trace.append(document(number, turns[number]))
    return trace


def pooled(trace: Trace, num_pages: int, is_guarded: bool) -> float:
    """Share of the pages that were found, with vLLM's pool; one request at a time."""
    pool = BlockPool(num_pages + 1, enable_caching=True, hash_block_size=16)
    if is_guarded:
        pool.free_block_queue = GuardQueue.adopt(pool.free_block_queue)
    hits = asked = 0
    for pages in trace:
        hashes = [BlockHash(page.encode()) for page in pages]
        found: list[KVCacheBlock] = []
        for each in hashes:
            cached = pool.get_cached_block(each, [0])
            if cached is None:
                break
            found += cached
        pool.touch(found)
        fresh = pool.get_new_blocks(len(pages) - len(found))
        for block, each in zip(fresh, hashes[len(found) :], strict=True):
            if pool.get_cached_block(each, [0]) is None:
                pool._insert_block_hash(make_block_hash_with_group_id(each, 0), block, num_tokens=16)
        hits, asked = hits + len(found), asked + len(pages)
        pool.free_blocks(reversed(found + fresh))
    return hits / asked


def belady(trace: Trace, num_pages: int) -> float:
    """Share of the pages found with Belady's rule: evict the page requested last, of one request the deepest."""
    places: dict[str, list[int]] = {}
    for i in reversed(range(len(trace))):
        for page in trace[i]:
            places.setdefault(page, []).append(i)
    held: dict[str, tuple[float, int]] = {}
    hits = asked = 0
    for pages in trace:
        is_found = True
        for page in pages:
            is_found = is_found and page in held
            hits, asked = hits + is_found, asked + 1
        for depth, page in enumerate(pages):
            if page not in held and len(held) == num_pages:
                del held[max(held.keys() - set(pages), key=held.__getitem__)]
            places[page].pop()
            held[page] = (places[page][-1] if places[page] else float("inf"), depth)
    return hits / asked


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--pages", type=int, default=4, help="of a document")
    parser.add_argument("--pool", type=int, default=200, help="pages that fit")
    parser.add_argument("--exponent", type=float, default=0.9, help="of Zipf's law")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, e.g. docs/results/prefix-eviction.json")
    args = parser.parse_args()
    if args.pool < max(20, args.pages):
        parser.error(f"--pool {args.pool} is out of range; allowed: at least {max(20, args.pages)}")
    traces = {"zipf": zipf(args), "scan": scan(args), "shift": zipf(args, 500), "chat": chat(args)}
    rows = []
    print(f"{'trace':<8}{'lru':>8}{'guard':>8}{'belady':>8}   share of prompt pages found in {args.pool}")
    for name, trace in traces.items():
        row = {
            "trace": name,
            "lru": pooled(trace, args.pool, False),
            "guard": pooled(trace, args.pool, True),
            "belady": belady(trace, args.pool),
        }
        rows.append(row)
        print(f"{name:<8}{row['lru']:8.3f}{row['guard']:8.3f}{row['belady']:8.3f}")
    if args.out:
        publish({"run": record("benchmarks.prefix_eviction", vars(args)), "traces": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
