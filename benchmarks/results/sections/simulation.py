"""Predicted throughput on GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..markdown import milliseconds, table
from ..provenance import made_by

ASSUMED = "assumed, not measured"
"""Origin of the figures of a GPU on which nothing was timed."""


def simulation_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section.

    Args:
        figures: what `python -m benchmarks.simulate` wrote.
    """
    run = figures["run"]
    settings, origin, rule = run["settings"], run["origin"], run["rule"]
    keys = f" Keys are {settings['keys']}." if rule == "redundancy" else ""
    return [
        "## Predicted throughput on GPUs, not measured",
        "**No row of this table was run on a GPU.** `python -m benchmarks.simulate` predicts it with a model of vLLM's "
        f"scheduler. Step times follow from the published figures of the GPU ({settings['gpu']}) and from the share of "
        f"them that an engine reaches ({origin}). Budget {settings['budget']}, buffer {settings['buffer']}, prompts of "
        f"{settings['prompt']} tokens, outputs of the stated mean with a spread of {settings['spread']:g}, "
        f"{settings['requests']} requests a replica. A replica has the fewest GPUs whose memory leaves "
        f"{settings['kv_share']:.0%} for KV. *Compaction* is what one request's compaction takes on each GPU of a "
        f"replica, with all that is computed for it since the last one. `{settings['policy']}` {run['scoring']}."
        f"{keys}{_assumed(run)} Where the scheduler's model can be checked, its error is known: see "
        "[the simulator against these runs](#the-simulator-against-these-runs).",
        simulation_table(figures["rows"]),
        # A prediction does not depend on the machine.
        made_by({key: value for key, value in run.items() if key != "machine"}),
    ]


def _assumed(run: Mapping[str, Any]) -> str:
    """State the share of a GPU's figures on which the cost of a compaction rests, if it was not measured."""
    shares = {"redundancy": "search", "error": "errors", "attention": "sums"}
    if run["origin"] != ASSUMED or run["rule"] not in shares:
        return ""
    share = run["efficiency"][shares[run["rule"]]]
    return (
        f" This is taken to reach {share:.0%} of the tensor cores' FLOP/s: half of what the kernels' accesses to "
        "shared memory allow, as no GPU has run them."
    )


def simulation_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A row per model, output length and number of GPUs."""
    head = (
        "model", "output tokens", "GPUs", "a replica", "full KV, tokens/s", "at once", "preemptions",
        "policy, tokens/s", "at once", "compaction, ms", "ratio",
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
                milliseconds(row["compaction_ms"]),
                f"{row['ratio']:.1f}x",
            ]
        )
    return table(head, lines)
