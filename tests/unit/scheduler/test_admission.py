"""What a request may hold, the promises made to requests, and the pool that vLLM's start-up check accepts."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.exceptions import VLLMValidationError
from vllm.v1.kv_cache_interface import FullAttentionSpec

from skipkv_vllm.config import CONFIG_KEY, KVPolicyConfig, RequestOptions
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.limits import Demand, Limits, LookaheadTokens, ceil_div, most_tokens
from skipkv_vllm.integration.compat import is_public, pool
from skipkv_vllm.integration.compat.pool import install_pool_check
from skipkv_vllm.integration.compat.request_checks import check_request
from skipkv_vllm.integration.compat.version import located
from skipkv_vllm.integration.compat.watched import POOL_CHECK
from skipkv_vllm.scheduler.admission import Holding, Ledger, Promise

PAGE = 16
CONFIG = KVPolicyConfig(kv_policy="skipkv", kv_budget=96, kv_buffer=32)


def limits_of(options: RequestOptions, config: KVPolicyConfig, num_prompt: int) -> Limits | None:
    return options.resolve(config, num_prompt).limits


def ledger(num_pages: int, is_bounded: bool = True) -> Ledger:
    return Ledger(num_pages, PAGE, is_bounded)


# ---- what a request may hold


@pytest.mark.parametrize(
    ("options", "num_prompt", "expected"),
    [
        ({}, 40, Limits(96, 32, 8, 40)),
        ({"kv_budget": 200}, 40, Limits(200, 32, 8, 40)),
        ({"kv_policy": "rkv"}, 400, Limits(96, 32, 8, 400)),
        ({"kv_policy": "full"}, 40, None),
    ],
)
def test_limits_follow_the_request(options, num_prompt, expected):
    assert limits_of(RequestOptions(**options), CONFIG, num_prompt) == expected


def test_an_unprotected_prompt_does_not_raise_the_limits():
    config = CONFIG.model_copy(update={"kv_protect_prompt": False})
    assert limits_of(RequestOptions(), config, 400) == Limits(96, 32, 8, 0)


@pytest.mark.parametrize(
    ("num_prompt", "is_deferred", "lookahead"),
    [
        (96, True, (0, 0)),
        (97, False, (97, 104)),
        (128, True, (128, 104)),
        (400, False, (128, 104)),
        (400, True, (400, 104)),
    ],
)
def test_a_method_that_decodes_ahead_needs_room_for_a_copy(num_prompt, is_deferred, lookahead):
    config = KVPolicyConfig(
        kv_policy="laq", kv_budget=96, kv_buffer=32, kv_protect_prompt=False, kv_defer_prompt=is_deferred
    )
    limits = limits_of(RequestOptions(), config, num_prompt)
    assert limits == Limits(96, 32, 8, 0, num_prompt if is_deferred else 0, num_prompt, 8)
    assert limits.lookahead == lookahead
    assert limits.first_bound == max(128, num_prompt if is_deferred else 0)
    assert limits_of(RequestOptions(kv_policy="rkv"), config, num_prompt).lookahead == (0, 0)


@pytest.mark.parametrize(
    ("num_prompt", "is_deferred", "lookahead"), [(128, False, (0, 0)), (129, False, (128, 5)), (400, True, (0, 0))]
)
def test_a_question_needs_room_behind_the_bound(num_prompt, is_deferred, lookahead):
    config = KVPolicyConfig(
        kv_policy="finch",
        kv_policy_config={"ask_chunks": True},
        kv_budget=96,
        kv_buffer=32,
        kv_protect_prompt=False,
        kv_defer_prompt=is_deferred,
    )
    assert limits_of(RequestOptions(kv_task_tokens=5), config, num_prompt).lookahead == lookahead


def test_a_request_holds_its_bound_or_its_whole_text():
    limits = Limits(96, 32, 8, 0)
    assert [most_tokens(limits, longest) for longest in (100, 128, 4000)] == [100, 128, 128]
    assert most_tokens(None, 4000) == 4000


# ---- promises


BOUND = Demand(128, 0)


def test_as_many_requests_start_as_have_room_at_their_bound():
    book = ledger(25)
    promises = [book.admit(BOUND, []) for _ in range(4) if book.fits(BOUND, [])]
    assert len(promises) == 3
    assert book.num_promised == 24
    book.release(promises[1])
    assert book.fits(BOUND, [])


def test_the_last_block_counts_in_full():
    assert ledger(2).fits(Demand(32, 0), [])
    assert not ledger(2).fits(Demand(33, 0), [])


def test_a_temporary_copy_is_promised_where_it_takes_more_than_the_rest_of_a_life():
    demand = Demand(128, 0, LookaheadTokens(20, 100))
    assert demand.num_blocks(PAGE) == 2 + 7
    assert Demand(128, 0, LookaheadTokens(15, 33)).num_blocks(PAGE) == 8
    book = ledger(17)
    promise = book.admit(demand, [])
    assert book.num_promised == 9
    assert not book.fits(demand, [])
    book.release(promise)
    assert book.num_promised == 0


def test_a_protected_prompt_in_the_cache_is_promised_once():
    book, demand = ledger(16), Demand(10 * PAGE, 6)
    prompt = [1, 2, 3, 4, 5, 6]
    first = book.admit(demand, prompt)
    assert book.num_promised == 10
    # The other needs 4 blocks of its own, and the shared ones are there.
    assert book.fits(demand, prompt)
    assert not book.fits(demand, [])
    second = book.admit(demand, prompt)
    assert book.num_promised == 14
    assert not book.fits(demand, prompt)
    # The blocks stay promised while one of their holders runs.
    book.release(first)
    assert book.num_promised == 10
    book.release(second)
    assert book.num_promised == 0


def test_cached_blocks_that_may_be_rewritten_count_for_each_request():
    book, demand = ledger(16), Demand(10 * PAGE, 0)
    book.admit(demand, [1, 2, 3])
    assert book.num_promised == 10
    assert not book.fits(demand, [1, 2, 3])


def test_optimistic_admission_promises_without_looking():
    book, holdings = ledger(4, is_bounded=False), []
    for name, num_blocks in {"a": 1, "b": 3}.items():
        assert book.fits(Demand(3 * PAGE, 0), [])
        holdings.append(Holding(name, book.admit(Demand(3 * PAGE, 0), []), num_blocks))
    assert book.num_promised == 6
    book.check_integrity(holdings)


@pytest.mark.parametrize("is_bounded", [True, False])
def test_a_request_that_may_be_compacted_waits_for_a_row(is_bounded):
    book = Ledger(100, PAGE, is_bounded, num_rows=2)
    first, second = (book.admit(BOUND, []) for _ in range(2))
    assert not book.fits(BOUND, [])
    assert book.fits(BOUND, [], needs_row=False)
    other = book.admit(BOUND, [], needs_row=False)
    book.check_integrity(
        [Holding(name, promise, 8) for name, promise in zip("abc", (first, second, other), strict=True)]
    )
    book.release(other)
    assert not book.fits(BOUND, [])
    book.release(first)
    assert book.fits(BOUND, [])


@pytest.mark.parametrize("wrong", ["too many", "none", "another", "row"])
def test_check_integrity_can_fail(wrong):
    book = ledger(10)
    promise = book.admit(Demand(4 * PAGE, 2), [7, 8])
    book.check_integrity([Holding("a", promise, 4)])
    holdings = {
        "too many": [Holding("a", promise, 5)],
        "none": [],
        "another": [Holding("a", promise, 4), Holding("b", Promise(1, []), 1)],
        "row": [Holding("a", promise._replace(has_row=False), 4)],
    }
    with pytest.raises(AssertionError):
        book.check_integrity(holdings[wrong])


@given(
    num_pages=st.integers(1, 30),
    steps=st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 200), st.integers(0, 6), st.integers(0, 8)), max_size=60
    ),
)
def test_promises_add_up_in_any_order(num_pages, steps):
    book, admitted = ledger(num_pages), {}
    for number, num_tokens, num_intact, num_cached in steps:
        name = f"r{number}"
        if name in admitted:
            book.release(admitted.pop(name).promise)
        else:
            demand, cached = Demand(num_tokens, num_intact), range(min(num_cached, (num_tokens - 1) // PAGE))
            if book.fits(demand, cached):
                admitted[name] = Holding(name, book.admit(demand, cached), ceil_div(num_tokens, PAGE))
        book.check_integrity(admitted.values())
    for holding in admitted.values():
        book.release(holding.promise)
    assert book.num_promised == 0


# ---- vLLM's start-up check


@pytest.fixture
def vllm_config():
    """As much of vLLM's configuration as its own memory estimate reads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=2048, hf_text_config=SimpleNamespace()),
        max_in_flight_tokens=256,
        max_concurrent_batches=2,
        speculative_config=None,
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            data_parallel_size=1,
            tensor_parallel_size=1,
        ),
        cache_config=SimpleNamespace(block_size=PAGE, num_gpu_blocks=40),
        additional_config={CONFIG_KEY: CONFIG.model_dump()},
    )


def check_pool(vllm_config, num_pages):
    """Run vLLM's check, as patched, with a pool of pages that requests can use."""
    install_pool_check()
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    needed = functools.partial(lambda config: spec.max_memory_usage_bytes(config), vllm_config)
    available = num_pages * spec.page_size_bytes
    config = [vllm_config] if is_public("size of the pool") else []
    module, _, name = located(POOL_CHECK).partition(":")
    check = getattr(importlib.import_module(module), name)
    check(available, needed, 2048, lambda memory: 77, *config)


def test_a_pool_smaller_than_the_longest_sequence_is_accepted_if_the_bound_fits(vllm_config):
    check_pool(vllm_config, 8)
    assert vllm_config.model_config.max_model_len == 2048


def test_a_pool_smaller_than_the_bound_is_refused_with_the_remedy(vllm_config):
    with pytest.raises(KVPolicyError, match=r"--kv-budget 96 \+ --kv-buffer 32: .* up to 128 tokens.*Lower"):
        check_pool(vllm_config, 7)
    assert vllm_config.model_config.max_model_len == 2048


def test_a_short_longest_sequence_needs_no_more_than_that(vllm_config):
    vllm_config.model_config.max_model_len = 64
    check_pool(vllm_config, 4)


@pytest.mark.parametrize("config", [None, {"kv_steering_vectors": {"math": "/math.safetensors"}}])
def test_where_nothing_is_evicted_vllm_decides_as_always(vllm_config, config):
    vllm_config.additional_config = {} if config is None else {CONFIG_KEY: KVPolicyConfig(**config).model_dump()}
    with pytest.raises(ValueError, match="max seq len"):
        check_pool(vllm_config, 127)
    check_pool(vllm_config, 128)


# ---- one request and the pool


def request(num_prompt: int, max_tokens: int, resumable: bool = False, **options) -> SimpleNamespace:
    params = SimpleNamespace(max_tokens=max_tokens, extra_args=options)
    prompt = {"prompt_token_ids": [1] * num_prompt, "prompt_embeds": None}
    return SimpleNamespace(request_id="0", sampling_params=params, resumable=resumable, **prompt)


def check_fits_alone(vllm_config, config, one: SimpleNamespace) -> None:
    options = RequestOptions.parse(one.sampling_params.extra_args, config, vllm_config.model_config.max_model_len)
    pool.check_fits_alone(vllm_config, config, one, options)


@pytest.mark.parametrize(
    "good",
    [
        request(20, 2000),
        request(20, 604, kv_policy="full"),
        request(20, 100, kv_budget=2000),
        request(584, 1400),
    ],
)
def test_a_request_that_fits_the_pool_alone_is_accepted(vllm_config, good):
    check_fits_alone(vllm_config, CONFIG, good)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(20, 605, kv_policy="full"), "max_tokens=605.; set max_tokens to at most 604, or use kv_policy='skip"),
        (request(700, 1, kv_policy="full"), "shorten the prompt, or use kv_policy='skipkv'"),
        (request(20, 2000, kv_budget=593), "kv_budget=593.; set kv_budget to at most 592"),
        (request(585, 1400), "raises its bound to 625.; shorten it to at most 584 tokens"),
        (request(20, 20, resumable=True), "send its input as separate requests"),
    ],
)
def test_a_request_that_could_outgrow_the_pool_is_refused_with_the_remedy(vllm_config, bad, message):
    with pytest.raises(KVPolicyError, match=message) as refused:
        check_fits_alone(vllm_config, CONFIG, bad)
    assert "KV cache holds only 624" in str(refused.value)


def test_a_server_that_only_steers_names_no_other_method(vllm_config):
    config = KVPolicyConfig(kv_steering_vectors={"math": "/math.safetensors"})
    with pytest.raises(KVPolicyError, match=r"; shorten the prompt$"):
        check_fits_alone(vllm_config, config, request(700, 1))


def test_a_deferred_prompt_counts_whole(vllm_config):
    config = KVPolicyConfig.parse(CONFIG.model_dump() | {"kv_protect_prompt": False, "kv_defer_prompt": True})
    check_fits_alone(vllm_config, config, request(616, 2000))
    with pytest.raises(KVPolicyError, match=r"holds its whole prompt of 617 tokens.; shorten it to at most 616 tokens"):
        check_fits_alone(vllm_config, config, request(617, 2000))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"kv_budget": 64}, "kv_budget=64"), ({"kv_policy": "rkv", "steering": "off"}, "kv_policy='rkv' cannot")],
)
def test_a_streaming_session_cannot_ask_for_what_it_does_not_get(vllm_config, options, named):
    vllm_config.cache_config.num_gpu_blocks = 129  # the whole of a sequence fits
    with pytest.raises(VLLMValidationError, match=f"^{named}.*send the input as separate requests"):
        check_request(vllm_config, request(20, 20, resumable=True, **options))
    check_request(vllm_config, request(20, 20, **options))
    check_request(vllm_config, request(20, 20, resumable=True, kv_policy="full", steering="off"))


def test_with_data_parallelism_the_pool_of_one_engine_counts(vllm_config):
    vllm_config.cache_config.num_gpu_blocks = 80
    vllm_config.parallel_config.data_parallel_size = 2
    with pytest.raises(KVPolicyError, match="holds only 624"):
        check_fits_alone(vllm_config, CONFIG, request(20, 605, kv_policy="full"))


def test_before_the_pool_is_known_nothing_is_refused(vllm_config):
    vllm_config.cache_config.num_gpu_blocks = None
    check_fits_alone(vllm_config, CONFIG, request(20, 2000, kv_policy="full"))
