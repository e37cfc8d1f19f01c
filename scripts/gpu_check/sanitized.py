"""Small calls of the native operators, for `compute-sanitizer`; inputs are made on the CPU, so it has little to do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Call the operators; return 1 if the library is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    import torch

    from skipkv_vllm.ops import Effect, native
    from tests.operators.backends import on
    from tests.operators.cases import CompactCase, MeasureCase, Pages, ScoreCase
    from tests.operators.tracking_cases import check_tracking
    from tests.unit.ops.test_parity_selection import SelectCase

    if why := native.unavailable(args.device):
        print(why, file=sys.stderr)
        return 1
    half = Pages(dtype=torch.bfloat16, dim=128)
    measuring = MeasureCase(half).build()
    results = [
        native.score_tokens(*on(args.device, ScoreCase(half).build())),
        native.score_tokens(*on(args.device, ScoreCase(Pages(dtype=torch.float8_e4m3fn, dim=128)).build())),
        native.measure_attention(*on(args.device, measuring), Effect.OUTPUT, 0.0),
        native.key_similarity(*on(args.device, measuring.keys())),
        native.select_keep(*on(args.device, SelectCase().build()))[0],
        native.compact_pages(*on(args.device, CompactCase(half).build())),
    ]
    check_tracking(native, 3, args.device, steps=1)
    if args.device == "cuda":
        torch.cuda.synchronize()
    args.out.write_text(json.dumps({"calls": len(results) + 1}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
