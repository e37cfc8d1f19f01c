"""The section of `docs/results.md` about predicted throughput, made of `docs/results/simulation.json`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

SIMULATION = Path("results", "simulation.json")


def simulation_section(figures: Mapping[str, Any]) -> list[str]:
    """Paragraphs in Markdown.

    Args:
        figures: what `python -m benchmarks.simulate` wrote.
    """
    run = figures["run"]
    settings, origin = run["settings"], run["origin"]
    return [
        "## Predicted throughput on GPUs, not measured",
        f"**No row of this table was run on a GPU.** `python -m benchmarks.simulate` predicts it: a model of vLLM's "
        f"scheduler, with step times worked out from the published figures of the GPU ({settings['gpu']}) and from "
        f"what an engine reaches of them ({origin}). Budget {settings['budget']}, buffer {settings['buffer']}, prompts "
        f"of {settings['prompt']} tokens, outputs of the stated mean with a spread of {settings['spread']:g}, "
        f"{settings['requests']} requests a replica. A replica has the fewest GPUs whose memory leaves "
        f"{settings['kv_share']:.0%} for KV. How far the scheduler's model is off where it can be checked stands in "
        "the section about throughput.",
        simulation_table(figures["rows"]),
        f"Made by `{shlex.join(run['command'])}` at commit `{run['commit']}` on {run['date']}.",
    ]


def simulation_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row per model, output length and number of GPUs."""
    head = (
        "model", "output tokens", "GPUs", "a replica", "full KV, tokens/s", "at once", "preemptions",
        "policy, tokens/s", "at once", "ratio",
    )  # fmt: skip
    lines = []
    for row in rows:
        full, policy = row["full"], row["policy"]
        lines.append(
            [
                row["model"],
                f"{row['output']:,}",
                str(row["gpus"]),
                str(row["ranks"]),
                f"{full['tokens_per_second']:,.0f}",
                f"{full['peak_running']:,}",
                f"{full['preemptions']:,}",
                f"{policy['tokens_per_second']:,.0f}",
                f"{policy['peak_running']:,}",
                f"{row['ratio']:.1f}x",
            ]
        )
    return table(head, lines)
