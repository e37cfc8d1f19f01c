"""An engine without vLLM around the scheduler's and the worker's side of eviction: every compaction, every token.

On a GPU it decodes through CUDA graphs, and PyTorch raises if the host waits for the device. On a CPU a recording of
the operators takes the place of the graphs. Each test records what it measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipkv_vllm.ops import dispatch
from tests.devices import DEVICES
from tests.small_engine import SERVERS, Engine, Report, Shape, shape_for
from tests.small_engine.attention import triton_kernel

NUM_REQUESTS = 24
NUM_STEPS = {"cpu": 150, "cuda": 400}
LAYOUTS = {"cpu": ("rows", "rows by token", "vec"), "cuda": ("rows", "rows by token")}
CASES = [
    pytest.param(device, LAYOUTS[device][i % len(LAYOUTS[device])], server, id=f"{server}-{device}".replace(" ", "-"))
    for device in DEVICES
    for i, server in enumerate(SERVERS)
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small matrices gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(device: str, layout: str, server: str, **options: Any) -> Engine:
    """Return an engine: on a GPU with heads of 128 elements in bfloat16, on a CPU as small as can be."""
    budget, buffer, kernel = 64, 16, None
    sizes: dict[str, Any] = {"ratio": 2 if layout == "rows by token" else 1}
    if device == "cuda":
        budget, buffer = 192, 32
        sizes |= {"dtype": torch.bfloat16, "width": 512, "query_heads": 16, "kv_heads": 4, "head_size": 128}
        sizes |= {"page_size": 16}
        found = triton_kernel()
        kernel = None if isinstance(found, str) else found
    shape = shape_for(torch.device(device), layout, budget, buffer, **(sizes | options))
    tested = SERVERS[server]
    config, traffic = tested.config(budget, buffer), tested.traffic(budget, buffer, NUM_STEPS[device])
    return Engine(config, shape, traffic, NUM_REQUESTS, kernel=kernel)


def check(report: Report, shape: Shape) -> None:
    """Attention saw the survivors, and the survivors are those of the definition."""
    is_exact = shape.dtype is torch.float32
    assert report.output_error <= (1e-4 if is_exact else 2e-2)
    if is_exact:
        # Only tokens whose scores are equal but for rounding may change places.
        assert report.agreement == 1.0 or (report.agreement >= 0.999 and report.largest_gap <= 1e-4)
    else:
        assert report.agreement >= 0.98


@pytest.mark.parametrize(("device", "layout", "server"), CASES)
def test_a_run(device: str, layout: str, server: str, record_property: Callable[[str, Any], None]) -> None:
    engine = make(device, layout, server)
    report = engine.run(NUM_STEPS[device])
    operators = dispatch.choose("score_tokens", device).backend
    record_property("figures", report.figures() | {"attention": engine.attention, "operators": operators})

    check(report, engine.shape)
    assert report.steps == NUM_STEPS[device]
    assert report.finished >= 4
    assert report.compactions >= 30
    assert report.handed_over_to_tokens > 0 or engine.shape.ratio > 1
    assert any(int(number.split()[0]) < int(number.split()[2]) for number in report.replays), "no padded graph ran"
    tested = SERVERS[server]
    assert (report.preempted > 0) == tested.preempts
    assert (report.postponed > 0) == ("kv_compactions_per_step" in tested.options)
    if tested.shares:
        assert report.replaced > 0
        assert report.handed_over_to_moves > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_in_bfloat16_and_float16(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        engine = make(device, "rows", "several methods", dtype=dtype)
        check(engine.run(90), engine.shape)


# ---- the checks themselves


def compacts_nothing(engine: Engine) -> None:
    engine.runtime._compactor._compact_pages = lambda *_: None


def forgets_a_layer(engine: Engine) -> None:
    compact = engine.runtime._compactor._compact_pages

    def all_but_the_last(caches: Any, pointers: Any, *rest: Any) -> None:
        last = caches[-1].clone()
        compact(caches, pointers, *rest)
        caches[-1].copy_(last)

    engine.runtime._compactor._compact_pages = all_but_the_last


def records_no_query(engine: Engine) -> None:
    engine.runtime.signals.queries.place = lambda *_: None


def hears_no_token(engine: Engine) -> None:
    engine.runtime.finish_forward = lambda _: None


def keeps_old_lengths(engine: Engine) -> None:
    prepare = engine.runtime.prepare

    def stale(batch: Any) -> Any:
        evicted = prepare(batch)
        return None if evicted is None else evicted._replace(device=torch.zeros_like(evicted.device))

    engine.runtime.prepare = stale


def keeps_the_newest(engine: Engine) -> None:
    scorer = engine.runtime._compactor._scorer
    scorer.scores = lambda batch, inputs: batch.positions.float()


FAULTS = (compacts_nothing, forgets_a_layer, records_no_query, hears_no_token, keeps_old_lengths, keeps_the_newest)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_checks_find(fault: Callable[[Engine], None]) -> None:
    engine = make("cpu", "rows", "hidden states")
    fault(engine)

    def run() -> None:
        report = engine.run(120)
        assert report.compactions > 10
        check(report, engine.shape)

    with pytest.raises((AssertionError, IndexError)):
        run()
