"""The paper's figures, and the commands that would reproduce them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..markdown import table

ORIGIN = {
    "figure": "Read off a figure (accuracies to about 0.2 points, lengths to about 0.5 %; `~` where markers overlap).",
    "table": "From a table of the paper.",
}


def published_section(paper: Mapping[str, Any]) -> list[str]:
    """Write the section.

    Args:
        paper: contents of `paper.json`.
    """
    parts = [
        f"The figures below are those of {paper['source']}. None of them was measured here: they need a GPU and the "
        "real weights. The command below each table would reproduce it with this package.",
        "\n".join(f"- {line}" for line in paper["conditions"]),
    ]
    for each in paper["tables"]:
        words = sum(not cell.strip("~").replace(".", "").isdigit() for cell in each["rows"][0] if cell)
        parts += [
            f"## {each['title']}",
            table(each["columns"], each["rows"], left=words),
            f"{ORIGIN[each['origin']]} {each['note']}",
            f"**Not run here.** To reproduce:\n\n```\n{each['command']}\n```",
        ]
    return parts
