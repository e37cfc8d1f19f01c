"""Drafters read and write where the tokens of a request lie, not where they would lie without eviction."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skipkv_vllm.integration.drafters import ResidentDrafter, ResidentTables, request_of_token
from skipkv_vllm.integration.resident import ResidentLengths
from skipkv_vllm.worker.batch import Evicted

CPU, BLOCK = torch.device("cpu"), 4
TABLE = torch.tensor([[7, 3, 9, 0], [2, 8, 0, 0]], dtype=torch.int32)
EVICTED = np.array([6, 0], dtype=np.int32)


class FakeDrafter:
    """Computes slots from logical positions, as vLLM's does, and stores no draft behind the longest text."""

    block_size, longest, uses_mrope = BLOCK, 16, False

    def __init__(self, needs_extra_input_slots: bool) -> None:
        self.needs_extra_input_slots = needs_extra_input_slots
        self.positions = torch.zeros(8, dtype=torch.int64)
        self._slot_mapping_buffer = torch.zeros(8, dtype=torch.int64)
        self.lengths: list[list[int]] = []

    def propose(self, number, *, common_attn_metadata):
        self.lengths.append(common_attn_metadata.seq_lens.tolist())
        common_attn_metadata.seq_lens -= 1
        return number

    def set_inputs_first_pass(self, positions, common):
        self.positions[: len(positions)] = positions
        common.slot_mapping = positions.clone()
        return len(positions), "indices", common

    def _update_positions_dependent_metadata(self, positions, common, batch_size, input_batch_size, block_size):
        self.positions[:batch_size] = positions + 1
        slots = torch.where(positions + 1 < self.longest, positions + 1, -1)
        self._slot_mapping_buffer[:batch_size] = slots
        return self.positions[:batch_size]


def metadata(**fields) -> SimpleNamespace:
    return SimpleNamespace(block_table_tensor=TABLE, _num_computed_tokens_cache="cached", **fields)


@pytest.fixture
def lengths() -> ResidentLengths:
    found = ResidentLengths(4, CPU)
    found.evicted = Evicted(EVICTED, torch.from_numpy(EVICTED))
    return found


def slot(request: int, place: int) -> int:
    return int(TABLE[request, place // BLOCK]) * BLOCK + place % BLOCK


def test_it_gets_resident_lengths_of_its_own(lengths):
    drafter = FakeDrafter(False)
    ResidentDrafter(drafter, lengths)
    given = metadata(seq_lens=torch.tensor([15, 5]), seq_lens_cpu_upper_bound=torch.tensor([16, 5]), max_seq_len=16)
    assert drafter.propose(3, common_attn_metadata=given) == 3
    assert drafter.lengths == [[9, 5]]
    assert given.seq_lens.tolist() == [15, 5]
    lengths.evicted = None
    drafter.propose(3, common_attn_metadata=given)
    assert drafter.lengths[1] == [15, 5]


def test_it_goes_on_behind_the_tokens_that_are_held(lengths):
    drafter = FakeDrafter(False)
    ResidentDrafter(drafter, lengths)
    drafter._update_positions_dependent_metadata(torch.tensor([13, 4]), metadata(), 2, 2, BLOCK)
    assert drafter._slot_mapping_buffer[:2].tolist() == [slot(0, 14 - 6), slot(1, 5)]
    drafter._update_positions_dependent_metadata(torch.tensor([15, 5]), metadata(), 2, 2, BLOCK)
    assert drafter._slot_mapping_buffer[:2].tolist() == [-1, slot(1, 6)]


def test_a_draft_model_reads_a_token_more_of_each_request(lengths):
    drafter = FakeDrafter(True)
    ResidentDrafter(drafter, lengths)
    common = metadata(query_start_loc=torch.tensor([0, 2, 5]))
    positions = torch.tensor([12, 13, 4, 5, 6])
    number, others, common = drafter.set_inputs_first_pass(positions, common)
    assert (number, others) == (5, "indices")
    assert common.slot_mapping.tolist() == [slot(0, 6), slot(0, 7), slot(1, 4), slot(1, 5), slot(1, 6)]


@pytest.mark.parametrize(
    ("starts", "positions", "expected"),
    [
        ([0, 1, 2], [13, 4], [7, 4]),
        ([0, 2, 5], [12, 13, 4, 5, 6], [6, 7, 4, 5, 6]),
        ([0, 1, 2], [13, 4, 99], [7, 4, 99]),
    ],
    ids=["decode", "prefill", "padded"],
)
def test_tables_map_resident_positions(lengths, starts, positions, expected):
    seen = []
    tables = SimpleNamespace(compute_slot_mappings=lambda *args, **kwargs: seen.append((args, kwargs)), cp_size=1)
    found = ResidentTables(tables, lengths, 16, CPU)
    assert found.cp_size == 1
    found.compute_slot_mappings("requests", torch.tensor(starts), torch.tensor(positions), 8, out="out")
    (args, kwargs) = seen[0]
    assert (args[2].tolist(), args[3], kwargs) == (expected, 8, {"out": "out"})


def test_padding_belongs_to_the_last_request():
    assert request_of_token(torch.tensor([0, 2, 5]), 7).tolist() == [0, 0, 1, 1, 1, 1, 1]
