"""Accuracy of the bundled model with equal and unequal budgets at equal total memory, in a dense reference.

    python -m benchmarks.unequal_budgets

`adakv` gives each kv head of a layer as many tokens as it has among the layer's best, `epicache` gives each layer its
share by a profile taken on training problems. One block table can hold neither; this is what it would be worth.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.results.pages import publish
from benchmarks.results.provenance import record
from benchmarks.results.sections.unequal_budgets import unequal_table
from benchmarks.results.store import DOCS, UNEQUAL
from skipkv_vllm.policies import policy_names

from .bench import Bench, policy_of, run
from .generation import NOT_HERE

BASES = ("snapkv", "rkv", "skipkv")
BUDGETS = ("10%", "25%", "40%", "60%")
SHARES = ("adakv", "epicache:0.5", "epicache:1.1", "epicache:2")  # 1.1 is EpiCache's for Llama


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100, help="of the dev split")
    parser.add_argument("--skip", type=int, default=0, help="first problems of the split that are left out")
    parser.add_argument("--train", type=int, default=16, help="training problems of the profile")
    parser.add_argument("--bases", nargs="+", default=list(BASES), metavar="POLICY")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), metavar="B", help="tokens, or shares of full KV")
    parser.add_argument(
        "--shares", nargs="+", default=list(SHARES), metavar="SHARES", help="adakv, or epicache:EXPONENT"
    )
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=DOCS / UNEQUAL)
    args = parser.parse_args()
    for name, least in {"problems": 1, "skip": 0, "train": 1, "buffer": 1, "window": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is out of range; allowed: at least {least}")
    for each in args.shares:
        if not re.fullmatch(r"adakv|epicache:\d+(\.\d+)?", each):
            parser.error(f"--shares {each!r} is neither adakv nor epicache:EXPONENT, e.g. epicache:1.1")
    scored = [name for name in policy_names() if name != "full" and not policy_of(name).needs & NOT_HERE]
    if unknown := [name for name in args.bases if name not in scored]:
        parser.error(f"--bases {' '.join(unknown)} cannot be used here; choose some of: {', '.join(scored)}")
    figures = run(Bench(args, skip=args.skip))
    summary = {"run": record("benchmarks.unequal_budgets", vars(args))} | figures
    print(unequal_table(summary))
    publish(summary, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
