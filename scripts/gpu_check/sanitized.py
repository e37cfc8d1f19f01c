"""One small call of each native operator, for `compute-sanitizer`, under which a launch takes 10 to 50 times as long.

Inputs are made on the CPU, so only our kernels are instrumented. Operators whose kernels differ by the dtype of the
cache are called with several. The figures are written after every call, so a run that is ended names those that it did.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipkv_vllm.ops import Effect, native
from tests.operators.backends import on
from tests.operators.cases import CompactCase, MeasureCase, Pages, ScoreCase
from tests.operators.measured_cases import CentralCase, NormsCase, PoolCase
from tests.operators.thought_cases import check_thoughts
from tests.operators.tracking_cases import check_tracking
from tests.unit.ops.test_parity_selection import SelectCase

Call = Callable[[Any, str], object]
"""Calls an operator of a module with tensors on a device."""

HALF, FLOAT = (Pages(dtype=dtype, dim=128) for dtype in (torch.bfloat16, torch.float32))
NARROW = Pages(dtype=torch.float8_e4m3fn, dim=128)
LENGTHS = (75, 33)


def _score(pages: Pages) -> Call:
    return lambda module, device: module.score_tokens(*on(device, ScoreCase(pages, LENGTHS).build()))


def _measure(pages: Pages) -> Call:
    case = MeasureCase(pages, LENGTHS, sinks=True)
    return lambda module, device: module.measure_attention(*on(device, case.build()), Effect.OUTPUT, 0.0)


def _record(narrow: bool) -> Call:
    query, scale = torch.randn(9, 6, 32), torch.ones(2) if narrow else None
    if narrow:
        query = query.to(torch.float8_e4m3fn)
    index, rows = torch.arange(9), torch.zeros(12, 6, 32)
    return lambda module, device: module.record_queries(*on(device, (query, index, rows, scale)))


def _similar(module: Any, device: str) -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(3, 9, 64), dim=-1)
    count, compared = torch.full((3,), 8), torch.zeros(3, dtype=torch.int64)
    state = on(device, (embeddings, torch.tensor([2, 0]), count, compared, torch.zeros(3, 20)))
    module.sentence_similarity(*state, 0.1, 0)


def _held(module: Any, device: str) -> None:
    placed, evicted = (torch.tensor(each, dtype=torch.int32) for each in ([20, 13], [9, 0]))
    sidecar = torch.zeros(2, 9, 2, 16, dtype=torch.int32)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    module.held_positions(*on(device, (sidecar, table, placed, evicted)), 40)


def _penalties(module: Any, device: str) -> None:
    ends = torch.arange(20, dtype=torch.int32).repeat(3, 1) * 5
    positions = torch.arange(60, dtype=torch.int32).expand(2, 1, 2, 60).contiguous()
    module.token_penalties(
        *on(device, (ends, torch.rand(3, 20), torch.full((3,), 12), torch.tensor([2, 0]), positions))
    )


def _steer(module: Any, device: str) -> Tensor:
    hidden, choice = torch.randn(5, 200).to(torch.bfloat16), torch.tensor([0, 1, 2, 0, 1], dtype=torch.int32)
    return module.steer_add(*on(device, (hidden, torch.ones(5), choice, torch.randn(3, 200))))


CALLS: dict[str, Call] = {
    "score_tokens, bfloat16": _score(HALF),
    "compact_pages": lambda module, device: module.compact_pages(*on(device, CompactCase(HALF).build())),
    "select_keep": lambda module, device: module.select_keep(*on(device, SelectCase().build())),
    "record_queries": _record(narrow=False),
    "track_sentences": lambda module, device: check_tracking(module, 3, device, steps=1),
    "score_tokens, e4m3": _score(NARROW),
    "score_tokens, float32": _score(FLOAT),
    "sentence_similarity": _similar,
    "token_penalties": _penalties,
    "held_positions": _held,
    "track_thoughts": lambda module, device: check_thoughts(module, 0, device, steps=1),
    "steer_add": _steer,
    "measure_attention, bfloat16": _measure(HALF),
    "measure_attention, float32": _measure(FLOAT),
    "key_similarity": lambda module, device: module.key_similarity(
        *on(device, MeasureCase(HALF, LENGTHS).build().keys())
    ),
    "vector_norms": lambda module, device: module.vector_norms(*on(device, NormsCase(MeasureCase(HALF)).build())),
    "pool_neighbours": lambda module, device: module.pool_neighbours(*on(device, PoolCase().build())),
    "central_tokens": lambda module, device: module.central_tokens(*on(device, CentralCase(HALF).build())),
    "record_queries, e4m3": _record(narrow=True),
}
"""Name -> call, the most important first: what every compaction and every step does, then the other methods."""


def run(module: Any, device: str, write: Callable[[dict[str, Any]], None]) -> None:
    """Make all calls, and write the figures after each one.

    Args:
        module: with the operators.
        device: of their tensors.
        write: gets the calls `done`, of how many, and the seconds until each one's end.
    """
    start, ends = time.monotonic(), dict[str, float]()
    write({"done": f"0 of {len(CALLS)} calls", "ends_s": ends})
    for name, call in CALLS.items():
        call(module, device)
        if device == "cuda":
            torch.cuda.synchronize()
        ends[name] = round(time.monotonic() - start, 1)
        write({"done": f"{len(ends)} of {len(CALLS)} calls", "ends_s": ends})


def main() -> int:
    """Call the operators; return 1 if the library is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if why := native.unavailable(args.device):
        print(why, file=sys.stderr)
        return 1
    run(native, args.device, lambda figures: args.out.write_text(json.dumps(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
