"""The operators' speed against PyTorch and R-KV-style code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..markdown import counted, milliseconds, table
from ..provenance import made_by

MIB = 2**20

Row = Mapping[str, Any]


def operators_section(figures: Mapping[str, Any]) -> list[str]:
    """Write the section of a CPU or of a GPU.

    Args:
        figures: what `python -m benchmarks.kernels` wrote.
    """
    run = figures["run"]
    on_gpu = run.get("device", {}).get("type") == "cuda"
    parts = [*(_gpu_text(run) if on_gpu else _cpu_text(run)), scoring_table(figures["scoring"])]
    parts.append(
        "*Distinct* keys are the worst case: no two are similar, and every pair must be compared once. *Similar* "
        "keys end the search early. *Of matmul* is the speed of those comparisons and of the logits, as a share of "
        + (
            f"PyTorch's best {run['settings']['dtype']} matmul in these rounds. *Of floor* is the time that this "
            "matmul and a copy of device memory allow, as a share of ours; *host* is the time in which the host "
            "enqueues the call. *Memory* is what PyTorch's allocator gives out during the call, *formula* what it "
            "should be."
            if on_gpu
            else "PyTorch's best float32 matmul in these rounds; above 100 the matmul is further from the processor's "
            "limit than the scoring is. *Memory* is the growth of the process. *Scratch* is the memory of our "
            "threads, which grows with L and not with its square."
        )
    )
    if figures.get("measuring"):
        parts += [
            "The newest queries' attention to each token, the change of their outputs without it (*error*), and the "
            "cosine of each key with the mean key (*similarity*):",
            measuring_table(figures["measuring"]),
        ]
    parts += [
        compaction_table(figures["compaction"]),
        "A compaction moves only the survivors of a head that lie beyond the budget; a rewrite moves all survivors. "
        "GB/s count the moved bytes."
        + (
            ""
            if on_gpu
            else " On CPUs a page keeps each element of a key in a cache line of its own, so the processor moves "
            "several times as much, whichever program asks for it."
        ),
    ]
    if figures.get("steps"):
        parts += ["What every step takes, by the number of tokens in it:", steps_table(figures["steps"])]
    if figures.get("skipped"):
        left_out = ", ".join(f"{row['requests']} x {row['length']:,}" for row in figures["skipped"])
        parts.append(f"Memory did not suffice for these requests x tokens: {left_out}.")
    return [*parts, made_by(run)]


def _cpu_text(run: Mapping[str, Any]) -> list[str]:
    return [
        "## The operators, timed here",
        f"One request in {_shape(run)}, {counted(run['threads'], 'thread')}. Implementations take turns and times are "
        f"medians, so ratios mean more than times. {_ARMS}",
    ]


def _gpu_text(run: Mapping[str, Any]) -> list[str]:
    device = run["device"]
    return [
        "## The operators, timed on a GPU",
        f"Requests in {_shape(run)}, on {device['name']}. *Ours* is the backend `{device['ours']}`. Times are between "
        "two events on the device, with its cache overwritten before each call; implementations take turns and times "
        f"are medians. {_ARMS}",
    ]


_ARMS = (
    "*PyTorch* is the definition that every backend is tested against. *R-KV style* gathers the keys, builds the L x L "
    "matrix of cosines and rewrites all survivors."
)


def _shape(run: Mapping[str, Any]) -> str:
    settings = run["settings"]
    return (
        f"{settings['layers']} layers of {settings['heads']} kv heads ({settings['query_heads']} query heads), head "
        f"size {settings['dim']}, window {settings['window']}, {settings['dtype']} pages of {settings['page_size']} "
        "tokens"
    )


class Column(NamedTuple):
    """A column: its title, the key of its cells, and how a cell is written."""

    title: str
    key: str
    write: Any = milliseconds


def _table(columns: Iterable[Column], rows: Sequence[Row]) -> str:
    """Write the columns of which any row has a figure."""
    shown = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    lines = [["" if row.get(c.key) is None else c.write(row[c.key]) for c in shown] for row in rows]
    return table([column.title for column in shown], lines)


def _several(rows: Sequence[Row]) -> list[Column]:
    """The number of requests in a call, if it differs."""
    return [Column("requests", "requests", str)] if any(row.get("requests", 1) > 1 for row in rows) else []


def _tokens(number: int) -> str:
    return f"{number:,}"


def _mib(value: float) -> str:
    return f"{value / MIB:,.1f}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _whole(number: float) -> str:
    return f"{number:.0f}"


def scoring_table(rows: Sequence[Row]) -> str:
    """Scoring at each length."""
    columns = [
        Column("L", "length", _tokens), *_several(rows), Column("keys", "keys", str), Column("ours, ms", "ours_ms"),
        Column("Triton, ms", "triton_ms"), Column("PyTorch, ms", "pytorch_ms"), Column("R-KV style, ms", "rkv_ms"),
        Column("against PyTorch", "speedup_over_pytorch", _times),
        Column("against R-KV style", "speedup_over_rkv", _times),
        Column("GFLOP/s", "gflops", _whole), Column("of matmul, %", "of_matmul", _percent),
        Column("of floor, %", "of_floor", _percent), Column("host, µs", "host_us", _whole),
        Column("memory, MiB", "ours_peak_bytes", _mib), Column("scratch, MiB", "scratch_bytes", _mib),
        Column("formula, MiB", "formula_bytes", _mib), Column("R-KV style, MiB", "rkv_peak_bytes", _mib),
    ]  # fmt: skip
    return _table(columns, rows)


def measuring_table(rows: Sequence[Row]) -> str:
    """Attention sums and output errors over the newest queries, and the similarity of keys, at each length."""
    columns = [Column("L", "length", _tokens), *_several(rows)]
    for name in ("attention", "error", "similarity"):
        columns += [
            Column(f"{name}, ms", f"{name}_ours_ms"),
            Column(f"{name}, Triton, ms", f"{name}_triton_ms"),
            Column(f"{name}, PyTorch, ms", f"{name}_pytorch_ms"),
            Column("of floor, %", f"{name}_of_floor", _percent),
        ]
    return _table(columns, rows)


def compaction_table(rows: Sequence[Row]) -> str:
    """Compaction to each budget."""
    rows = [row | {"moved": f"{row['moved_per_head']:.0f} ({row['most_moved_per_head']})"} for row in map(dict, rows)]
    columns = [
        Column("budget", "budget", _tokens), *_several(rows), Column("buffer", "buffer", str),
        Column("ours, ms", "ours_ms"), Column("Triton, ms", "triton_ms"), Column("PyTorch, ms", "pytorch_ms"),
        Column("rewrite, ms", "rewrite_ms"), Column("against rewrite", "speedup_over_rewrite", _times),
        Column("moved a head (most)", "moved", str), Column("moved, MiB", "bytes", _mib),
        Column("fewest, MiB", "fewest_bytes", _mib), Column("rewrite, MiB", "rewrite_bytes", _mib),
        Column("GB/s", "gb_per_s", "{:.1f}".format), Column("copy, GB/s", "copy_gb_per_s", "{:.1f}".format),
        Column("selection, ms", "select_ms"), Column("PyTorch, ms", "select_pytorch_ms"),
        Column("positions, ms", "positions_ms"), Column("host, µs", "host_us", _whole),
    ]  # fmt: skip
    return _table(columns, rows)


def steps_table(rows: Sequence[Row]) -> str:
    """What every step takes."""
    columns = [
        Column("operator", "operator", str), Column("tokens", "tokens", _tokens), Column("ours, ms", "ours_ms"),
        Column("Triton, ms", "triton_ms"), Column("PyTorch, ms", "pytorch_ms"), Column("floor, ms", "floor_ms"),
        Column("host, µs", "host_us", _whole),
    ]  # fmt: skip
    return _table(columns, rows)
