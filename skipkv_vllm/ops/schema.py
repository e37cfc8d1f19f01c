"""The operators `torch.ops.skipkv.*`: the schema of each, and the fake twin that PyTorch traces.

The schemas are the contract between the runtime and every backend (C++, CUDA, Triton, PyTorch); `torch_backend` defines
what each operator computes. `csrc/generate.py` reads this file when the native libraries are built. Sizes:

    R requests, L layers, H kv heads, Hq query heads, D head size, P tokens a page, N slots (longest request),
    W window, M moves, T tokens of a step, E hidden size

`caches` are vLLM's tensors, one a layer, `[pages, H, P, 2 * D]` (latents: D), all of one shape, dtype and strides;
`pointers` int64 `[L]` are their addresses on the device, for kernels that take all layers at once; `layout` is how a
page is packed (`Layout`). Tables hold int32 page ids; ids past a request's pages are never read. Per-request lengths
are int32 `[R]` on the device. Scores and positions are `[R, L, H, N]` by slot; entries past a request's length are
never read. State that lives from step to step has a row for each concurrent request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "skipkv"

SCHEMAS: dict[str, str] = {}
"""Operator -> schema."""

NATIVE: set[str] = set()
"""Operators that the libraries in C++ and CUDA have."""

FAKES: dict[str, Callable[..., Any]] = {}
"""Operator -> function that returns uninitialised results of the right shape and dtype, for PyTorch's tracing."""


def operator(schema: str, *, native: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an operator, named after the decorated function.

    Args:
        schema: its signature, in PyTorch's notation.
        native: whether the libraries in C++ and CUDA have it.

    Returns:
        A decorator of the fake twin. The twin is called with keyword arguments and names those that it needs.
    """
    names = re.findall(r"\w+(?=[,)])", schema.split(" -> ")[0])

    def declare(twin: Callable[..., Any]) -> Callable[..., Any]:
        def fake(*args: Any, **kwargs: Any) -> Any:
            return twin(**dict(zip(names, args, strict=False)), **kwargs)

        SCHEMAS[twin.__name__], FAKES[twin.__name__] = schema, fake
        if native:
            NATIVE.add(twin.__name__)
        return twin

    return declare


@operator(
    "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, Tensor num_resident, "
    "Tensor queries, Tensor? penalty, int pool, float mix, float threshold) -> Tensor"
)
def score_tokens(*, positions: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


@operator(
    "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, Tensor num_resident, "
    "Tensor queries, Tensor num_queries, Tensor newest, Tensor? sinks, int effect, float negligible) -> Tensor"
)
def measure_attention(*, positions: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


@operator("(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor num_resident, int length) -> Tensor")
def key_similarity(*, caches: list[Tensor], table: Tensor, length: int, **_: Any) -> Tensor:
    return table.new_empty(table.shape[0], len(caches), caches[0].shape[1], length, dtype=torch.float32)


@operator(
    "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, Tensor num_resident, bool values, "
    "int norm, int part, Tensor? weights) -> Tensor"
)
def vector_norms(*, positions: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


@operator("(Tensor scores, Tensor positions, Tensor num_resident, int window, int pool) -> Tensor")
def pool_neighbours(*, positions: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


@operator(
    "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, Tensor num_resident, "
    "Tensor begin, Tensor end, Tensor quota, int longest) -> Tensor"
)
def central_tokens(*, positions: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(positions, dtype=torch.bool)


@operator(
    "(Tensor scores, Tensor positions, Tensor num_resident, Tensor num_keep, Tensor pin_below, Tensor pin_from, "
    "int max_moves) -> (Tensor source, Tensor hole, Tensor count)"
)
def select_keep(*, positions: Tensor, max_moves: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = positions.shape[:-1]
    moves = positions.new_empty(*rows, max_moves, dtype=torch.int32)
    return moves, torch.empty_like(moves), positions.new_empty(rows, dtype=torch.int32)


@operator(
    "(Tensor(a!)[] caches, Tensor pointers, int layout, Tensor(b!) sidecar, Tensor positions, Tensor source_table, "
    "Tensor target_table, Tensor num_keep, Tensor source, Tensor hole, Tensor count) -> ()"
)
def compact_pages(**_: Any) -> None:
    return None


@operator("(Tensor sidecar, Tensor table, Tensor num_placed, Tensor num_evicted, int length) -> Tensor")
def held_positions(*, sidecar: Tensor, table: Tensor, length: int, **_: Any) -> Tensor:
    layers, _pages, heads, _size = sidecar.shape
    return sidecar.new_empty(table.shape[0], layers, heads, length)


@operator(
    "(Tensor token_ids, Tensor? hidden, Tensor spans, int num_tokens, Tensor delimiters, bool merge, "
    "Tensor(a!) ends, Tensor(b!) count, Tensor(c!) after_delimiter, Tensor(d!) open_length, Tensor(e!) open_sum, "
    "Tensor(f!) embeddings, Tensor(g!) text) -> ()"
)
def track_sentences(**_: Any) -> None:
    return None


@operator(
    "(Tensor embeddings, Tensor rows, Tensor count, Tensor(a!) compared, Tensor(b!) penalties, float threshold, "
    "int rule) -> ()"
)
def sentence_similarity(**_: Any) -> None:
    return None


@operator("(Tensor ends, Tensor penalties, Tensor first, Tensor rows, Tensor positions) -> Tensor")
def token_penalties(*, positions: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(positions, dtype=torch.float32)


@operator(
    "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor first, Tensor end) -> Tensor",
    native=False,
)
def key_moments(*, caches: list[Tensor], table: Tensor, **_: Any) -> Tensor:
    _pages, heads, _size, width = caches[0].shape
    return table.new_empty(2, table.shape[0], len(caches), heads, width // 2, dtype=torch.float32)


@operator(
    "(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor spans, Tensor stored_table, Tensor centre, "
    "Tensor spread, Tensor(a!) stored, Tensor(b!) signs, Tensor(c!) sizes) -> ()",
    native=False,
)
def store_tokens(**_: Any) -> None:
    return None


@operator(
    "(Tensor(a!)[] caches, Tensor pointers, int layout, Tensor(b!) sidecar, Tensor table, Tensor slots, "
    "Tensor places, Tensor first_position, Tensor stored_table, Tensor stored) -> ()",
    native=False,
)
def recall_tokens(**_: Any) -> None:
    return None


@operator(
    "(Tensor signs, Tensor sizes, Tensor stored_table, Tensor number, Tensor queries, int length) -> Tensor",
    native=False,
)
def stored_attention(*, signs: Tensor, number: Tensor, length: int, **_: Any) -> Tensor:
    return number.new_empty(number.shape[0], *signs.shape[1:3], length, dtype=torch.float32)


@operator("(Tensor query, Tensor index, Tensor(a!) ring, Tensor? scale) -> ()")
def record_queries(**_: Any) -> None:
    return None


@operator(
    "(Tensor token_ids, Tensor spans, Tensor vocabulary, Tensor keywords, bool merge, int interval, Tensor strengths, "
    "Tensor(a!) state, int written, Tensor(b!) choice, Tensor(c!) coefficient) -> ()"
)
def track_thoughts(**_: Any) -> None:
    return None


@operator("(Tensor hidden, Tensor coefficient, Tensor choice, Tensor vectors) -> Tensor")
def steer_add(*, hidden: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(hidden)
