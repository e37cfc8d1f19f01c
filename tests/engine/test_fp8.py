"""An 8-bit KV cache: without eviction nothing changes, and eviction follows from the dequantised keys.

A float32 copy of all keys that the model hands to vLLM shadows the pages. Every compaction of every layer is
compared with it: the keys that the policy reads, and the cells that move.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from skipkv_vllm.ops import torch_backend
from skipkv_vllm.ops.paging import FP8_CACHES, Layout
from skipkv_vllm.worker.compaction import Compactor
from tests import harness
from tests.harness import PAGE, Job
from tests.reference.comparison import Tolerance, check_replayed, settings_of

if TYPE_CHECKING:
    from tests.reference.references import ReferenceCache

if not torch.cuda.is_available() and not torch.cpu._is_avx512_supported():
    pytest.skip("vLLM's CPU attention reads 8-bit caches with AVX-512 or AMX only", allow_module_level=True)

# Not every GPU kernel reads 8-bit keys beside float32 queries.
FIRST = "bfloat16" if torch.cuda.is_available() else "float32"
KINDS = [pytest.param("fp8", FIRST, id="e4m3"), pytest.param("fp8_e5m2", "bfloat16", id="e5m2")]
METHODS = ["skipkv", "rkv", "h2o", "snapkv", "streaming_llm"]
SCALES = (0.25, 0.3, 0.8, 1.7)
"""Scales of keys by layer, in turn, as calibrated checkpoints have them."""
MANTISSA = {torch.float8_e4m3fn: (2**-3, 2**-9), torch.float8_e5m2: (2**-2, 2**-16)}
"""Relative and absolute error of a number that vLLM truncated to 8 bits; on CPUs it does not round."""


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the layers' keys scales, as a checkpoint would."""
    from vllm.model_executor.layers.attention import attention

    original, count = attention.set_default_quant_scales, iter(range(10**6))

    def with_scales(layer: Any, register_buffer: bool = False) -> None:
        original(layer, register_buffer)
        layer._scale_number = getattr(layer, "_scale_number", None) or next(count) + 1
        scale = SCALES[layer._scale_number % len(SCALES)]
        layer._k_scale.fill_(scale)
        layer._k_scale_float = scale

    monkeypatch.setattr(attention, "set_default_quant_scales", with_scales)
    harness.shutdown()
    yield
    harness.shutdown()  # no other test may get this engine


class Shadow:
    """The model's keys in float32 pages, compared with the real ones."""

    def __init__(self, llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.compactor: Compactor = runner.runtime._compactor
        self.num_compared = 0
        self.num_moves = 0
        real = self.compactor.cache.pages.caches
        pages, heads, size, double = real[0].shape
        self.device = real[0].device
        # K is in the first half of each token, whatever the layout of the real pages.
        self.caches = [torch.zeros(pages, heads, size, double, device=self.device) for _ in real]
        context = runner.vllm_config.compilation_config.static_forward_context
        self.scales = []
        for layer, cache in zip(context.values(), self.caches, strict=True):
            self._record(layer.impl, cache, monkeypatch)
            self.scales.append(layer._k_scale_float)
        self.scorer = self.compactor._scorer
        monkeypatch.setattr(self.scorer, "scores", self._scores(self.scorer.scores))
        monkeypatch.setattr(self.compactor, "_select_tokens", self._select_tokens(self.compactor._select_tokens))

    @staticmethod
    def _record(impl: Any, cache: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        update, size = impl.do_kv_cache_update, cache.shape[2]

        def record(layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
            update(layer, key, value, kv_cache, slots)
            held = slots >= 0
            pages, offsets = slots[held] // size, slots[held] % size
            cache[pages, :, offsets, : key.shape[2]] = key[: slots.shape[0]][held].float()

        monkeypatch.setattr(impl, "do_kv_cache_update", record)

    def _scores(self, original: Any) -> Any:
        """Wrap `Scorer.scores`: check that it reads the cached keys and returns the policy's scores."""

        def scores(batch: Any, inputs: Any) -> Tensor:
            got = original(batch, inputs)
            relative, least = MANTISSA[self.compactor.cache.pages.caches[0].dtype]
            for r, (order, request) in enumerate(batch.jobs):
                length = order.num_resident
                pages = batch.source_table[r, : -(-length // self.caches[0].shape[2])].long()
                for i, cache in enumerate(self.caches):
                    read = self.compactor.cache.keys(i, pages, length)
                    true = cache[pages].transpose(0, 1).flatten(1, 2)[:, :length, : read.shape[2]]
                    assert ((read - true).abs() <= true.abs() * relative + least * self.scales[i]).all()
                    self.num_compared += 1
                assert request.policy.is_batched
                wanted = torch.full_like(got[r], -torch.inf)
                self.scorer._score_request(batch, inputs, r, wanted)
                torch.testing.assert_close(got[r, ..., :length], wanted[..., :length], rtol=2e-4, atol=2e-6)
            return got

        return scores

    def _select_tokens(self, original: Any) -> Any:
        """Wrap `Compactor._select_tokens`: repeat its moves in the float32 pages."""

        def select(batch: Any, scores: Tensor) -> Any:
            moves = original(batch, scores)
            pointers = torch.tensor([cache.data_ptr() for cache in self.caches], device=self.device)
            tables = (batch.source_table, batch.target_table, batch.num_keep)
            sidecar = self.compactor.cache.sidecar.clone()
            torch_backend.compact_pages(self.caches, pointers, Layout.ROWS, sidecar, batch.positions, *tables, *moves)
            self.num_moves += int(moves.number.sum())
            return moves

        return select


@pytest.mark.parametrize(("cache_dtype", "dtype"), KINDS)
def test_equals_stock_where_nothing_is_evicted(cache_dtype: str, dtype: str) -> None:
    prompts, arguments = harness.demo_prompts(4), {"kv_cache_dtype": cache_dtype, "dtype": dtype}
    stock = harness.run(Job(prompts, [], 100, every=5, arguments=arguments, num_logprobs=3))

    for more, policies in (({"kv_budget": 1024}, METHODS[:4]), ({}, ["full"] * 4)):
        outcome = harness.run(Job(prompts, policies, 100, every=5, arguments=arguments | more, num_logprobs=3))
        assert not any(len(trace.kept) for trace in outcome.traces)
        assert outcome.tokens == stock.tokens
        assert outcome.logprobs == stock.logprobs


@pytest.mark.parametrize(("cache_dtype", "dtype"), KINDS)
def test_survivors_follow_from_the_dequantised_keys(
    scaled: None, cache_dtype: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = harness.demo_prompts(len(METHODS), at_least=100)
    arguments = {"kv_cache_dtype": cache_dtype, "dtype": dtype}
    job = Job(prompts, METHODS, 330, every=5, arguments=arguments)
    llm = harness.engine(**arguments)
    shadow = Shadow(llm, monkeypatch)
    assert len(set(shadow.scales)) > 1

    outcome = harness.run_on(llm, job)

    assert shadow.compactor.cache.pages.caches[0].dtype is FP8_CACHES[cache_dtype]
    num_compactions = [len(trace.kept) for trace in outcome.traces]
    assert min(num_compactions) >= 3
    assert shadow.num_compared == sum(num_compactions) * len(shadow.caches)
    assert shadow.num_moves > 0
    for number, (prompt, trace) in enumerate(zip(prompts, outcome.traces, strict=True)):
        settings = settings_of(job, number)
        bound = settings.keep(len(prompt)) + settings.buffer
        pages = [sample.num_pages for sample in outcome.samples if sample.request == number]
        assert max(pages) <= -(-bound // PAGE)
        assert any(later < earlier for earlier, later in itertools.pairwise(pages)), "no block was freed"
        if METHODS[number] == "streaming_llm":
            # This method chooses by position alone.
            for length, kept in zip(trace.logical_length.tolist(), trace.kept, strict=True):
                newest = settings.keep(len(prompt)) - len(prompt)
                wanted = [*range(len(prompt)), *range(length - newest, length)]
                assert (torch.as_tensor(kept) == torch.tensor(wanted)).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_engine_cuda.py runs it on a GPU")
def test_runner_v2_compacts_8_bits_too(references: ReferenceCache) -> None:
    """The error of 8-bit keys is bounded by the log probabilities that the oracle gives to the engine's tokens."""
    prompts = harness.demo_prompts(3, at_least=100)
    arguments = {"kv_cache_dtype": "fp8", "kv_budget": 176, "kv_buffer": 32}
    job = Job(prompts, ["skipkv", "h2o", "streaming_llm"], 150, every=2, arguments=arguments, num_logprobs=1)

    outcome = harness.run(job, "v2")

    assert (outcome.is_v2, outcome.cache) == (True, "torch.uint8")
    check_replayed(job, outcome, references.model, Tolerance(most=8.0, mean=0.2, survivors=0.15))
