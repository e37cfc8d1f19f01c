"""What eviction costs a prediction, and which facts are still found afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from skipkv_vllm.evaluation.figures import FULL
from skipkv_vllm.evaluation.report import HEAD, rows_of

from ..links import EVALUATION
from ..markdown import table
from ..provenance import made_by
from ..store import FIDELITY


def fidelity_section(report: Mapping[str, Any]) -> list[str]:
    """Write the section about fidelity.

    Args:
        report: contents of `fidelity.json`, see `skipkv_vllm.evaluation.command.run`.
    """
    settings = report["settings"]
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
        "compaction on. Intervals are 95 % by paired bootstrap over texts. [Fidelity and recall]"
        f"({EVALUATION}) explains the other columns. Buffer {settings['buffer']}, window {settings['window']}, "
        f"granularity {settings['granularity']}.{fair}",
        f"![What eviction costs a prediction]({FIDELITY.stem}.svg)",
        table(HEAD, rows_of(report), left=1),
        "Excess by kind of text:",
        table(("method", "budget", *names), by_source, left=1),
        made_by(report),
    ]


def other_texts_section(report: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Write the section that compares with texts outside this repository.

    Args:
        report: contents of `fidelity.json`.
        others: contents of `fidelity-other-texts.json`: `rows` have the excess of a method by kind of text and budget,
            and `findings` are about both summaries.
    """
    budgets = sorted({row["budget"] for row in report["rows"]})
    kinds = ("default", *others["rows"][0]["excess"])
    default = {(row["method"], row["budget"]): row["excess"] for row in report["rows"]}
    values = [
        [
            default[row["method"], budget] if kind == "default" else row["excess"][kind][str(budget)]
            for kind in kinds
            for budget in budgets
        ]
        for row in others["rows"]
    ]
    names = [f"`{row['method']}`{row.get('remark', '')}" for row in others["rows"]]
    head = [f"{kind}, {at:,}" if at == budgets[0] else f"{at:,}" for kind in kinds for at in budgets]
    return [
        "### On other texts",
        others["about"],
        table(("method", *head), _best_in_bold(names, values, "{:.3f}", min), left=1),
        "\n".join(f"- {finding}" for finding in others["findings"]),
        others["note"],
    ]


def windowed_section(report: Mapping[str, Any]) -> list[str]:
    """Write the section about a model whose other layers have a sliding window.

    Args:
        report: contents of `fidelity-gemma3.json`, as of `fidelity.json`.
    """
    settings = report["settings"]
    return [
        "### Beside layers with a sliding window",
        f"`{Path(settings['model']).name}` (270M) has a window of 512 tokens in 15 of its 18 layers. Only the other "
        f"three are compacted. It reads {settings['texts']} texts of {settings['length']:,} tokens, one of each kind; "
        f"full KV loses {report['full_nll']:.4f} nats a token. The intervals of so few texts overlap.",
        table(HEAD, rows_of(report), left=1),
        made_by(report),
    ]


def recall_section(report: Mapping[str, Any]) -> list[str]:
    """Write the section about recall.

    Args:
        report: contents of `recall.json`, see `benchmarks.recall.run`.
    """
    lengths = list(dict.fromkeys(row["length"] for row in report["rows"]))
    parts = [
        "## Recall",
        f"Facts are stated once in a text, and each is asked for at its end. [Fidelity and recall]({EVALUATION}) "
        "explains the measurement. A log probability is the mean over the tokens of the right answer's code, in nats.",
    ]
    for length in lengths:
        rows = [row for row in report["rows"] if row["length"] == length]
        parts += [f"Texts of {length:,} tokens:", recall_table(rows)]
    return [*parts, *report.get("findings", ()), made_by(report["run"])]


def recall_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row per method, full KV first, and two columns per budget.

    Args:
        rows: of one length.
    """
    cells = {(row["method"], row["budget"]): row for row in rows}
    (full,) = (row for row in rows if row["method"] == FULL)
    budgets = sorted({row["budget"] for row in rows if row is not full}, reverse=True)
    methods = dict.fromkeys(row["method"] for row in rows if row is not full)
    ranked = sorted(methods, key=lambda method: -cells[method, budgets[0]]["logprob"])
    remarks = {row["method"]: row.get("remark", "") for row in rows}
    values = [[cells[method, budget]["logprob"] for budget in budgets] for method in ranked]
    lines = [["full KV", f"{full['right']} of {full['questions']}", f"{full['logprob']:.2f}"]]
    lines[0] += [""] * 2 * (len(budgets) - 1)
    for method, line in zip(ranked, _best_in_bold(ranked, values, "{:.2f}", max), strict=True):
        pairs = zip(budgets, line[1:], strict=True)
        columns = [cell for budget, text in pairs for cell in (str(cells[method, budget]["right"]), text)]
        lines.append([f"`{method}`{remarks[method]}", *columns])
    head = [text for budget in budgets for text in (f"right at {budget:,} tokens", "log probability")]
    return table(("method", *head), lines, left=1)


def _best_in_bold(
    names: Sequence[str], values: Sequence[Sequence[float]], form: str, best: Callable[..., str]
) -> list[list[str]]:
    """Rows of a table; the best number of each column, as it is shown, is bold."""
    texts = [[form.format(value) for value in row] for row in values]
    tops = [best(column, key=float) for column in zip(*texts, strict=True)]
    return [
        [name, *(f"**{text}**" if float(text) == float(top) else text for text, top in zip(row, tops, strict=True))]
        for name, row in zip(names, texts, strict=True)
    ]
