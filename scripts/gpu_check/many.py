"""Compact many requests in one step: temporary memory against its limit, and the time that the host is busy."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.worker.cache import temporary_bytes
from tests.small_engine import Shape, shape_for

from .requests import Requests

MOST_HOST_MS = 10
AT_ONCE = KVPolicyConfig.parse({"kv_policy": "skipkv"}).kv_compactions_per_step
"""Compactions of a step, if a server's requests come due at once; of more the host time is recorded, not judged."""
SLACK = 1.1
"""Share of the limit that may be used; allocators round up."""
POLICIES = ("skipkv", "rkv")


def shape_of(device: torch.device, number: int, budget: int, buffer: int, is_tiny: bool) -> Shape:
    """Return the heads of an 8B model, or few small ones."""
    sizes: dict[str, Any] = {"layers": 2, "page_size": 16}
    if not is_tiny:
        sizes |= {"layers": 36, "query_heads": 32, "kv_heads": 8, "head_size": 128, "width": 4096}
        sizes |= {"dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    options = {"max_requests": number, "vocabulary": 1024, "max_tokens": 32 * number}
    return shape_for(device, "rows", budget, buffer, **(options | sizes))


def measure(policy: str, number: int, device: torch.device, is_tiny: bool) -> dict[str, Any]:
    """Compact `number` requests at once, three times; return the last figures."""
    budget, buffer = (64, 48) if is_tiny else (1024, 128)
    shape = shape_of(device, number, budget, buffer, is_tiny)
    cache = (
        2 * shape.num_blocks * shape.block_size * shape.layers * shape.kv_heads * shape.head_size * shape.dtype.itemsize
    )
    if device.type == "cuda" and (free := torch.cuda.mem_get_info()[0]) < 1.3 * cache:
        return {"skipped": f"its cache takes {cache >> 30} GiB, of {free >> 30} that are free"}
    requests = Requests(policy, shape, number, budget, buffer)
    requests.start()
    found: dict[str, Any] = {}
    for _ in range(3):
        before = _start_of_peak(device)
        found = requests.compact()
        if before is not None:
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        requests.advance()
    limit = temporary_bytes(shape.layers, shape.kv_heads, budget + buffer)
    return found | {"limit_bytes": limit, "us_per_request": round(1e3 * found["host_ms"] / number, 1)}


def _start_of_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def misses_of(name: str, number: int, row: dict[str, Any]) -> list[str]:
    """Return which limits the figures of a row, of `number` requests at once, exceed."""
    found = []
    if row.get("peak_bytes", 0) > SLACK * row.get("limit_bytes", 0):
        found.append(f"{name}: {row['peak_bytes'] >> 20} MiB at once, the limit is {row['limit_bytes'] >> 20}")
    if number <= AT_ONCE and row.get("host_ms", 0) > MOST_HOST_MS:
        found.append(f"{name}: the host was busy for {row['host_ms']} ms, the limit is {MOST_HOST_MS}")
    return found


def main() -> int:
    """Measure and write the figures; what they miss is for the caller to judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device, figures, misses = torch.device(args.device), {}, []
    for number in (4, 9) if args.tiny else (AT_ONCE, 64, 256):
        for policy in POLICIES:
            name = f"{policy} {number}"
            figures[name] = row = measure(policy, number, device, args.tiny)
            misses += misses_of(name, number, row)
            args.out.write_text(json.dumps({"rows": figures, "misses": misses}))
            print(name, row)
            # The next ones need the memory.
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
