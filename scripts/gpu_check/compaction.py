"""Time the first compaction of a fresh process, with or without a warm-up, and the second one."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from skipkv_vllm.ops import dispatch
from skipkv_vllm.worker.warm_up import warm_up
from tests.small_engine import Shape, shape_for

from .requests import Requests


def shape_of(device: torch.device, budget: int, buffer: int) -> Shape:
    """Return the heads of an 8B model on a GPU, and few small ones on a CPU."""
    options: dict[str, Any] = {"max_requests": 2, "vocabulary": 1024, "max_tokens": 256}
    if device.type == "cuda":
        options |= {"layers": 36, "query_heads": 32, "kv_heads": 8, "head_size": 128, "width": 4096, "page_size": 16}
        options |= {"dtype": torch.bfloat16}
    return shape_for(device, "rows", budget, buffer, **options)


@contextmanager
def by_pytorch() -> Iterator[None]:
    """Let PyTorch's definitions compute the operators of runtimes that are made meanwhile."""
    before = os.environ.get(dispatch.OVERRIDE)
    os.environ[dispatch.OVERRIDE] = "torch"
    dispatch.choose.cache_clear()
    try:
        yield
    finally:
        del os.environ[dispatch.OVERRIDE]
        if before is not None:
            os.environ[dispatch.OVERRIDE] = before
        dispatch.choose.cache_clear()


def load_pytorch(shape: Shape, budget: int, buffer: int) -> None:
    """Compact twice without our operators.

    PyTorch loads each of its kernels at the first call, which takes it some time; in a server the model's steps before
    have loaded them. Only our own are to be new when the time is taken.
    """
    with by_pytorch():
        requests = Requests("skipkv", shape, 1, budget, buffer)
        requests.start()
        for _ in range(2):
            requests.compact()
            requests.advance()


def measure(shape: Shape, budget: int, buffer: int, warms_up: bool) -> dict[str, Any]:
    """Return the milliseconds of the first and the second compaction with our operators, and of the warm-up."""
    kind = shape.device.type
    load_pytorch(shape, budget, buffer)
    figures: dict[str, Any] = {"operators": dispatch.choose("score_tokens", kind).backend}
    requests = Requests("skipkv", shape, 1, budget, buffer)
    if warms_up:
        start = time.perf_counter()
        warm_up(requests.runtime, hidden_size=shape.width, dtype=shape.dtype, max_length=shape.max_length)
        if kind == "cuda":
            torch.cuda.synchronize()
        figures["warm_up_ms"] = round((time.perf_counter() - start) * 1e3, 1)
    requests.start()
    figures["first_ms"] = requests.compact()["total_ms"]
    requests.advance()
    figures["second_ms"] = requests.compact()["total_ms"]
    return figures


def main() -> int:
    """Compact one request twice and write how long it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--warm-up", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    budget, buffer = (1024, 128) if args.device == "cuda" else (64, 48)
    shape = shape_of(device, budget, buffer)
    args.out.write_text(json.dumps(measure(shape, budget, buffer, args.warm_up)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
