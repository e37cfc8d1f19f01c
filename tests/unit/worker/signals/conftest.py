"""Backends of the operators, and trackers that use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from skipkv_vllm.ops import dispatch, native
from skipkv_vllm.policies import SentenceOptions
from skipkv_vllm.sentences import SentenceTables
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker
from tests.unit.sentences.tokenizers import TABLES
from tests.unit.worker.signals.tracking import HIDDEN, MakeTracker


@pytest.fixture(scope="module", params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Makes trackers use the C++ operators, then their definitions in PyTorch."""
    if request.param == "native" and (why := native.unavailable("cpu")):
        pytest.skip(f"the C++ operators: {why}")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(dispatch.OVERRIDE, request.param)
        dispatch.choose.cache_clear()
        yield request.param
    dispatch.choose.cache_clear()


@pytest.fixture(scope="module")
def make_tracker(backend: str) -> MakeTracker:
    def make(
        tables: SentenceTables = TABLES,
        hidden: int = HIDDEN,
        slots: int = 4,
        keeps_text: bool = False,
        **options: Any,
    ) -> SentenceTracker:
        options = {"similarity_threshold": 0.9, "max_sentences": 64} | options
        tracker = SentenceTracker(
            tables,
            SentenceOptions(**options),
            num_rows=slots,
            max_length=100,
            hidden_size=0 if keeps_text else hidden,
            vocab_size=20,
            dtype=torch.float32,
            device=torch.device("cpu"),
            keeps_text=keeps_text,
        )
        assert dispatch.choose("track_sentences", "cpu").backend == backend
        return tracker

    return make
