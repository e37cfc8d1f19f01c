"""The bundled model's tokenizer."""

from __future__ import annotations

import pytest

from tests.unit.evaluation.fakes import MODEL


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)
