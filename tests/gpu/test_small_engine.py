"""An engine without vLLM around the scheduler's and the worker's side of eviction: every compaction, every token.

On a GPU it decodes through CUDA graphs, and PyTorch raises if the host waits for the device. On a CPU a recording of
the operators takes the place of the graphs. Each test records what it measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from skipkv_vllm.ops import dispatch
from tests.devices import DEVICES
from tests.small_engine import SERVERS, Engine, Report, Server, Shape, shape_for
from tests.small_engine.attention import triton_kernel
from tests.small_engine.scheduler import Scheduler

NUM_REQUESTS = 24
NUM_STEPS = {"cpu": 150, "cuda": 400}
LAYOUTS = {"cpu": ("rows", "rows by token", "vec"), "cuda": ("rows", "rows by token")}
EVERY = [
    pytest.param(device, layouts[i % len(layouts)], server, id=f"{server}-{device}".replace(" ", "-"))
    for device, layouts in LAYOUTS.items()
    for i, server in enumerate(SERVERS)
]
CASES = [case for case in EVERY if case.values[0] in DEVICES]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small matrices gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Sizes(NamedTuple):
    """Budget and buffer of requests, and what of a shape follows from the device and the layout."""

    budget: int
    buffer: int
    of_shape: dict[str, Any]


def sizes_for(device: str, layout: str) -> Sizes:
    """On a GPU heads have 128 elements in bfloat16, on a CPU everything is as small as can be."""
    sizes: dict[str, Any] = {"ratio": 2 if layout == "rows by token" else 1}
    if device == "cpu":
        return Sizes(64, 16, sizes)
    sizes |= {"dtype": torch.bfloat16, "width": 512, "query_heads": 16, "kv_heads": 4, "head_size": 128}
    return Sizes(192, 32, sizes | {"page_size": 16})


def make(device: str, layout: str, server: str, **options: Any) -> Engine:
    """Return an engine of the sizes of a device; `options`: see `Shape`."""
    sizes, kernel = sizes_for(device, layout), None
    if device == "cuda":
        found = triton_kernel()
        kernel = None if isinstance(found, str) else found
    numbers = (sizes.budget, sizes.buffer)
    shape = shape_for(torch.device(device), layout, *numbers, **(sizes.of_shape | options))
    tested = SERVERS[server]
    config, traffic = tested.config(*numbers), tested.traffic(*numbers, NUM_STEPS[device])
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


def check_traffic(report: Report, device: str, ratio: int, tested: Server) -> None:
    """Everything that a run is meant to test happened."""
    assert report.steps == NUM_STEPS[device]
    assert report.finished >= 4
    assert report.compactions >= 30
    assert report.handed_over_to_tokens > 0 or ratio > 1
    assert any(int(number.split()[0]) < int(number.split()[2]) for number in report.replays), "no padded graph ran"
    assert (report.preempted > 0) == tested.preempts
    assert (report.postponed > 0) == ("kv_compactions_per_step" in tested.options)
    if tested.shares:
        assert report.replaced > 0
        assert report.handed_over_to_moves > 0


@pytest.mark.parametrize(("device", "layout", "server"), CASES)
def test_a_run(device: str, layout: str, server: str, record_property: Callable[[str, Any], None]) -> None:
    engine = make(device, layout, server)
    report = engine.run(NUM_STEPS[device])
    operators = dispatch.choose("score_tokens", device).backend
    record_property("figures", report.figures() | {"attention": engine.attention, "operators": operators})

    check(report, engine.shape)
    check_traffic(report, device, engine.shape.ratio, SERVERS[server])


@pytest.mark.parametrize(("device", "layout", "server"), EVERY)
def test_the_traffic_of_a_run(device: str, layout: str, server: str) -> None:
    """Schedule it without a model: what a run on a GPU demands must come about there, too."""
    (budget, buffer, of_shape), tested, report = sizes_for(device, layout), SERVERS[server], Report()
    shape = shape_for(torch.device("cpu"), layout, budget, buffer, **of_shape)
    traffic = tested.traffic(budget, buffer, NUM_STEPS[device])
    arrivals = traffic.arrivals(NUM_REQUESTS, shape.vocabulary, 0)
    scheduler = Scheduler(tested.config(budget, buffer), shape, traffic, arrivals)
    while report.steps < NUM_STEPS[device] and not scheduler.is_done:
        scheduled = scheduler.step()
        batch = scheduled.batch
        report.steps += 1
        report.compactions += len(scheduled.orders.compactions)
        if batch and all(request.count == 1 for request in batch):
            report.replays[f"{len(batch)} of {shape.padded(len(batch))}"] = 1
        for request in batch:
            request.num_known += request.samples
    report.count(scheduler)
    check_traffic(report, device, shape.ratio, tested)


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
