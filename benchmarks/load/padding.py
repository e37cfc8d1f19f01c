"""The padding that batch grouping can save, counted from the steps and admissions of a run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

from .engine import STEP_COLUMNS, Run
from .lengths import Offered

TOKENS, COMPACTIONS = STEP_COLUMNS.index("tokens"), STEP_COLUMNS.index("compactions")


def capture_sizes(max_num_seqs: int, ceiling: int = 512) -> list[int]:
    """Batch sizes, in tokens, that vLLM 0.32 captures as CUDA graphs by default (on GPUs other than Blackwell)."""
    largest = min(2 * max_num_seqs, ceiling)
    return [n for n in (1, 2, 4, *range(8, 256, 8), *range(256, largest + 1, 16)) if n <= largest]


def graph_padding(tokens: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Count padded and real tokens of steps that run as a graph. A step above the largest size runs without one.

    Args:
        tokens: of each step.
        sizes: captured, ascending.
    """
    captured = [n for n in tokens if 0 < n <= sizes[-1]]
    return sum(sizes[bisect_left(sizes, n)] - n for n in captured), sum(captured)


def parallel_padding(ranks: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Padded and real tokens of data-parallel ranks that step together, each padded to the largest.

    Args:
        ranks: tokens of each step of each rank; a rank that is done takes part with none, as in vLLM.
    """
    steps = max(map(len, ranks))
    tokens = np.array([np.pad(np.asarray(rank, dtype=np.int64), (0, steps - len(rank))) for rank in ranks])
    real = int(tokens.sum())
    return len(ranks) * int(tokens.max(axis=0).sum()) - real, real


def static_padding(admitted: Sequence[Offered], batch_size: int) -> tuple[int, int, int, int]:
    """Count the padding of an engine that pads batches, for requests that come in this order.

    Returns:
        Padded and real prompt tokens, padded and real output tokens.
    """
    padded = [0, 0]
    for start in range(0, len(admitted), batch_size):
        batch = np.array(admitted[start : start + batch_size])
        padded = [p + int((column.max() - column).sum()) for p, column in zip(padded, batch.T, strict=True)]
    prompts, outputs = np.array(admitted).sum(axis=0).tolist()
    return padded[0], prompts, padded[1], outputs


def effects(whole: Run, ranks: Sequence[Run], load: Sequence[Offered], batch_size: int) -> dict[str, Any]:
    """All four, as shares of the real tokens, and compactions a launch.

    Args:
        whole: a run of the load.
        ranks: runs of its parts, dealt to data-parallel ranks.
        load: its requests.
        batch_size: requests at once.
    """
    graph = graph_padding(whole.steps[:, TOKENS].astype(int).tolist(), capture_sizes(batch_size))
    parallel = parallel_padding([rank.steps[:, TOKENS].astype(int).tolist() for rank in ranks])
    prompt_pad, prompts, output_pad, outputs = static_padding([load[i] for i in whole.admitted], batch_size)
    launches = whole.steps[:, COMPACTIONS]
    return {
        "graph_padding": graph[0] / max(1, graph[1]),
        "parallel_padding": parallel[0] / max(1, parallel[1]),
        "compactions": whole.compactions,
        "compaction_launches": int((launches > 0).sum()),
        "compactions_a_launch": whole.compactions / max(1, int((launches > 0).sum())),
        "static_prompt_padding": prompt_pad / prompts,
        "static_output_padding": output_pad / outputs,
        "longest_overtaken": whole.longest_overtaken,
    }
