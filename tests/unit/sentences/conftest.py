"""The bundled model's tokenizer."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def qwen_like() -> PreTrainedTokenizerFast:
    """Train the bundled model's tokenizer, which takes some seconds."""
    from benchmarks.tiny_reasoner.tokenizer import build_tokenizer

    return build_tokenizer()
