"""What eviction costs a prediction, on a real model: `skipkv fidelity` with defaults.

    python -m benchmarks.fidelity                        # SmolLM2 on the texts of benchmarks.texts
    python -m benchmarks.fidelity --write-docs           # and write docs/results/fidelity.*, docs/results.md

`make real-models MODELS=smollm2` fetches the model. docs/guides/evaluation.md says what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.real_models import FOLDER
from benchmarks.texts import default_sources
from skipkv_vllm.evaluation.command import guarded, make_parser, run
from skipkv_vllm.evaluation.machine import relative
from skipkv_vllm.evaluation.report import HEAD, rows_of, write

FIDELITY = Path("results", "fidelity.json")
MODEL = FOLDER / "smollm2"
MAX_TEXTS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    prog = "python -m benchmarks.fidelity"
    parser = make_parser(prog, relative(str(MODEL)))
    parser.set_defaults(max_texts=MAX_TEXTS)
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/fidelity.* and docs/results.md")
    args = parser.parse_args(words)

    def action() -> None:
        report = run(args, [*prog.split(), *words], default_sources)
        if args.write_docs:
            publish(report, Path("docs"))

    return guarded(prog, action)


def publish(report: Mapping[str, Any], docs: Path) -> None:
    """Write a report into the documentation, and the page of results anew."""
    from benchmarks.accuracy.docs import write_docs

    write(report, docs / FIDELITY.with_suffix(""))
    print(f"wrote {write_docs(docs)}")


def fidelity_section(report: Mapping[str, Any]) -> list[str]:
    """Paragraphs in Markdown about a report."""
    settings, machine = report["settings"], report["machine"]
    sources = ", ".join(f"{count} of {name}" for name, count in settings["sources"].items())
    sinks = settings["policy_config"].get("random", {}).get("sinks")
    fair = f" `random` protects the first {sinks} tokens." if sinks else ""
    names = list(settings["sources"])
    by_source = [
        (row["method"], row["budget"], *(f"{row['by_source'][name]:.4f}" for name in names)) for row in report["rows"]
    ]
    return [
        "## What eviction costs a prediction",
        f"`{Path(settings['model']).name}` reads {settings['texts']} texts of {settings['length']:,} tokens "
        f"({sources}) as prompts that are compacted like generated text. The excess is the mean log loss minus that of "
        f"full KV ({report['full_nll']:.4f} nats a token over whole texts) at the same positions, from the first "
        "compaction on; intervals are 95 % by paired bootstrap over texts. [fidelity.md](fidelity.md) explains the "
        f"other columns. Buffer {settings['buffer']}, window {settings['window']}, granularity "
        f"{settings['granularity']}.{fair}",
        "![What eviction costs a prediction](results/fidelity.svg)",
        table(HEAD, rows_of(report), left=1),
        "Excess by kind of text:",
        table(("method", "budget", *names), by_source, left=1),
        f"Made by `{' '.join(report['command'])}` at commit `{report['commit']}`, on {machine['cores']} cores of "
        f"{machine['cpu']}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
