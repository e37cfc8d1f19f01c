"""Write the pages of results from the JSON summaries beside them.

python -m benchmarks.results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skipkv_vllm.evaluation.command import guarded

from .pages import write_pages
from .store import DOCS


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)

    def action() -> None:
        for page in write_pages(args.docs):
            print(f"wrote {page}")

    return guarded(parser.prog, action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="folder whose results/ has summaries and gets the pages"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
