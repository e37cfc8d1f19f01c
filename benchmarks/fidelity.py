"""What eviction costs a prediction, on a real model: `skipkv fidelity` with defaults.

    python -m benchmarks.fidelity                        # SmolLM2 on the texts of benchmarks.texts
    python -m benchmarks.fidelity --write-docs           # and write docs/results/fidelity.* and the pages

`make real-models MODELS=smollm2` fetches the model. docs/guides/evaluation.md says what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.real_models import FOLDER
from benchmarks.results.pages import write_pages
from benchmarks.results.store import DOCS, FIDELITY
from benchmarks.texts import default_sources
from skipkv_vllm.evaluation.command import guarded, make_parser, run
from skipkv_vllm.evaluation.machine import relative
from skipkv_vllm.evaluation.report import write

MODEL = FOLDER / "smollm2"
MAX_TEXTS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    prog = "python -m benchmarks.fidelity"
    parser = make_parser(prog, relative(str(MODEL)))
    parser.set_defaults(max_texts=MAX_TEXTS)
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/fidelity.* and the pages")
    args = parser.parse_args(words)

    def action() -> None:
        report = run(args, [*prog.split(), *words], default_sources)
        if args.write_docs:
            write(report, DOCS / FIDELITY.with_suffix(""))
            for page in write_pages(DOCS):
                print(f"wrote {page}")

    return guarded(prog, action)


if __name__ == "__main__":
    sys.exit(main())
