"""Memory that a call of an operator takes on a GPU beside its arguments, by arithmetic on shapes."""

from __future__ import annotations

from typing import NamedTuple

SCRATCH_BYTES = 256 << 20
"""Scratch memory of a launch; more rows than it holds take several launches, one after the other."""


class Call(NamedTuple):
    """Sizes of a call.

    Attributes:
        rows: requests times layers times kv heads.
        length: tokens of the longest request.
        dim: head size.
        window: queries of a request.
        group: query heads of a kv head.
    """

    rows: int
    length: int
    dim: int
    window: int
    group: int

    @property
    def _blocks(self) -> int:
        return -(-self.length // (64 if self.dim <= 128 else 32))


def scoring_bytes(backend: str, call: Call) -> int | None:
    """Return the bytes of `score_tokens`: its result and its scratch memory. None for a backend without a formula.

    They must follow the allocations in `csrc/cuda/score_tokens.cu` and `ops/triton_backend/scoring.py`; a test compares
    the first.
    """
    result = 4 * call.rows * call.length
    if backend == "native":
        row = call.length * (28 + 4 * call.window) + 4 * (call._blocks + 1) * call.dim + 4 * call._blocks
        # A row's softmax has one divisor, which the limit leaves out.
        return result + _rows_at_once(call.rows, row) * (row + 4)
    if backend == "triton":
        # 36 bytes a token for sorted positions, cells, norms, sums and attention; PyTorch sorts 64-bit indices.
        row = call.length * (64 + 4 * call.window) + 4 * call._blocks * call.dim
        return result + _rows_at_once(call.rows, row) * row
    return None


def measuring_bytes(call: Call, output_error: bool) -> int:
    """Return the bytes of CUDA's `measure_attention`: its result and its scratch memory."""
    row = 4 * call.window * call.group * (3 + (call.dim if output_error else 0))
    return 4 * call.rows * call.length + _rows_at_once(call.rows, row) * row


def _rows_at_once(rows: int, row: int) -> int:
    return min(rows, max(1, SCRATCH_BYTES // row))
