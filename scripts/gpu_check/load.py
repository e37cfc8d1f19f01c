"""Load a native library in a fresh process and compare the schemas of all its operators with ours."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    """Load the library of a device; return 1 if it cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    import torch

    from skipkv_vllm.ops import native
    from skipkv_vllm.ops.schema import NATIVE

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU", file=sys.stderr)
        return 1
    start = time.perf_counter()
    why = native.unavailable(args.device)
    figures: dict[str, Any] = {
        "library": os.environ.get(native.OVERRIDES[args.device], "of the checkout"),
        "operators": len(NATIVE),
        "load_ms": round((time.perf_counter() - start) * 1e3, 1),
        "why_not": why,
        # Without a GPU it can be loaded where PyTorch is one for CUDA, and not called.
        "why_not_cuda": native.unavailable("cuda") if torch.version.cuda else "this torch has no CUDA",
    }
    if args.device == "cuda":
        figures["built_for"] = native.built_for(native.path_of("cuda"))
    args.out.write_text(json.dumps(figures))
    if why is not None:
        print(why, file=sys.stderr)
    return 0 if why is None else 1


if __name__ == "__main__":
    sys.exit(main())
