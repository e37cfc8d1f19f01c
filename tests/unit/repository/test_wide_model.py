"""The model with larger heads, which GPU tests run, computes the same function as the bundled model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from skipkv_vllm import bundled_model
from tests.wide_model import FACTOR, widen


def test_a_widened_model_computes_the_same(tmp_path: Path) -> None:
    narrow, wide = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (bundled_model(), widen(Path(bundled_model()), tmp_path / "wide"))
    )
    tokens = torch.randint(3, 500, (2, 200), generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        wanted, got = narrow(tokens), wide(tokens, use_cache=True)

    assert got.past_key_values.layers[0].keys.shape[-1] == FACTOR * 32
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=2e-4)
