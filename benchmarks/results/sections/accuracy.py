"""The bundled model's accuracy on its held-out problems."""

from __future__ import annotations

from skipkv_vllm.evaluation.figures import OURS

from ..arms import NOTES, arms_table, batch_table, headline, setting, versus_table
from ..plots.accuracy import FIGURES
from ..provenance import how_it_was_made
from ..store import Summary

PREFIX = "tiny-"
"""What the names of the figures' files begin with."""

OTHERS = (
    "These methods ran on fewer of the same problems and at fewer budgets, with their defaults. The gates of "
    "`trimkv` were trained on this model (`python -m benchmarks.tiny_reasoner.train_gates`), and the thresholds of "
    "`thinkv` were calibrated on it at the budget of 25 %. Every prompt is shorter than every budget, so `finch` and "
    "`laq`, which compress prompts, only show how they go on while decoding."
)


def accuracy_section(tiny: Summary) -> list[str]:
    """Write the section.

    Args:
        tiny: contents of `tiny.json`, see `benchmarks.accuracy.summary.summarise`.
    """
    parts = [
        "## The bundled model, run here",
        "The bundled model is a toy that was trained on problems of this kind. Four fifths of its text repeats an "
        "earlier sentence, and the rest states once the values it must remember: the kind of text that SkipKV is "
        "made for. All problems have the same length and the same number of doubts. A compaction therefore falls at "
        "the same place in each, and no method can show shorter answers. The figures show how methods and budgets "
        "compare on this model in the real engine; they do not show how accurate another model will be. "
        "`skipkv_vllm/models/tiny-reasoner/README.md` explains how the task was designed. No setting is fitted to "
        "this model.",
        setting(tiny),
        headline(tiny),
        *(f"![{title}]({PREFIX}{name}.svg)" for name, title in FIGURES.items()),
        "### All figures",
        arms_table(tiny),
        NOTES,
    ]
    if others := tiny.get("others"):
        pairs = others["batch_invariance"]
        compared, changed = (sum(row[key] for row in pairs) for key in ("compared", "other_answer"))
        parts += [
            "### The other methods of the literature",
            setting(others),
            OTHERS,
            arms_table(others),
            f"{compared} answers were also generated at batch size 1; {changed} of them differ.",
        ]
    if tiny["versus"]:
        parts += [f"### {OURS} against the others at equal budget", versus_table(tiny)]
    if tiny["batch_invariance"]:
        parts += ["### Does the batch size change an answer?", batch_table(tiny)]
    return [*parts, "### How it was made", how_it_was_made(tiny["run"])]
