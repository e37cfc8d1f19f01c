"""Time the first compaction of a fresh process, with or without a warm-up, and the second one."""

from __future__ import annotations

import argparse
import json
import sys
import time
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
    # CUDA itself starts before.
    torch.ones(1, device=device).sum().item()
    figures: dict[str, Any] = {"operators": dispatch.choose("score_tokens", args.device).backend}
    requests = Requests("skipkv", shape, 1, budget, buffer)
    if args.warm_up:
        start = time.perf_counter()
        warm_up(requests.runtime, hidden_size=shape.width, dtype=shape.dtype, max_length=shape.max_length)
        if args.device == "cuda":
            torch.cuda.synchronize()
        figures["warm_up_ms"] = round((time.perf_counter() - start) * 1e3, 1)
    requests.start()
    figures["first_ms"] = requests.compact()["total_ms"]
    requests.advance()
    figures["second_ms"] = requests.compact()["total_ms"]
    args.out.write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
