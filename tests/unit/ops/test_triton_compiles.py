"""Triton's compiler accepts every kernel as the operators launch it, which its interpreter cannot show.

No GPU is needed. Covered are all kernels for both architectures, each dtype of the cache with one head size and each
head size with one dtype. One architecture is enough where the code hardly differs: for the second of two dtypes of one
width, for head sizes that fill the same tiles as 128, and for other constants of a kernel. For every combination see
`tests/operators/triton_launches.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import pytest
import torch

from tests.operators.backends import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("an interpreting Triton does not compile", allow_module_level=True)

from skipkv_vllm.ops.triton_backend import measuring, scoring
from tests.operators.triton_calls import CACHES, LATENTS, OF_CACHES, OTHERS, RECALLING, VARIANTS, Call, Server, Traffic
from tests.operators.triton_launches import ARCHITECTURES, Launch, Resources, all_kernels, compiled, recorded, resources

MOST_SHARED = 99 << 10
"""Bytes of shared memory of a block on the smallest GPUs of the last generations, compute capability 8.6 and 8.9."""
MOST_STACK = 256
"""Bytes of a thread's stack. A kernel that needs more has far too few registers for its tiles, and is very slow."""

SERVERS = [
    *((Server(cache=cache), 80) for cache in CACHES),
    *((Server(cache=cache), 90) for cache in (torch.float32, torch.bfloat16, torch.float8_e4m3fn)),
    *((Server(dim=dim), architecture) for dim in (64, 256) for architecture in ARCHITECTURES),
    *((Server(dim=dim), architecture) for dim, architecture in ((80, 90), (96, 80), (112, 90))),
    *((LATENTS, architecture) for architecture in ARCHITECTURES),
]
ALL_OPERATORS = (*OF_CACHES, *RECALLING, *OTHERS, *VARIANTS)


def launches_of(calls: Iterable[Call], server: Server, *traffic: Traffic) -> list[Launch]:
    """Return the different launches of some operators; each is compiled once."""
    with recorded() as launches:
        for each in traffic or (Traffic(),):
            for call in calls:
                call(server, each)
    return list({(launch.name, launch.key): launch for launch in launches}.values())


def name_of(call: Call) -> str:
    """Name a call in a report."""
    if not isinstance(call, partial):
        return call.__name__
    return "-".join([call.func.__name__, *(f"{name}={value}" for name, value in call.keywords.items())])


_used: dict[tuple[str, str, int], Resources] = {}


def check(launches: list[Launch], architecture: int) -> None:
    """Compile launches that were not compiled before, and check what all of them use."""
    for launch in launches:
        key = (launch.name, launch.key, architecture)
        if key not in _used:
            _used[key] = resources(compiled(launch, architecture))
        used = _used[key]
        assert used.shared <= MOST_SHARED, f"{launch.name}: {used}"
        assert used.stack <= MOST_STACK, f"{launch.name}: {used}"
        assert used.local == 0, f"{launch.name}: {used}"


@pytest.mark.parametrize(
    ("server", "architecture"), SERVERS, ids=[f"{str(s.cache)[6:]}-{s.dim}-sm{a}" for s, a in SERVERS]
)
def test_kernels_that_read_caches(server, architecture):
    check(launches_of(OF_CACHES if server is LATENTS else (*OF_CACHES, *RECALLING), server), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_other_kernels(architecture):
    check(launches_of(OTHERS, Server()), architecture)


@pytest.mark.parametrize("server", [Server(), LATENTS], ids=["heads", "latents"])
def test_other_constants(server):
    check(launches_of(VARIANTS, server), 80)


def test_every_kernel_is_compiled():
    launches = [*launches_of((*OF_CACHES, *RECALLING, *OTHERS), Server()), *launches_of(OF_CACHES, LATENTS)]
    assert all_kernels() == {launch.name for launch in launches}


@pytest.mark.parametrize(
    ("server", "call"),
    [*((Server(), call) for call in ALL_OPERATORS), *((LATENTS, call) for call in OF_CACHES)],
    ids=[*map(name_of, ALL_OPERATORS), *(f"latents-{name_of(call)}" for call in OF_CACHES)],
)
def test_a_kernel_is_compiled_once_for_all_requests(server, call, monkeypatch):
    """A compilation takes a second or more, in which no request gets a token."""
    for module in (measuring, scoring):
        monkeypatch.setattr(module, "SCRATCH_BYTES", 1 << 20)  # several launches of some rows each
    traffic = (
        Traffic(),
        Traffic((80,), width=16, tokens=16, moves=16),
        Traffic((1151, 128), width=72, tokens=1, moves=127),
        Traffic((97,) * 16, width=7, tokens=48, moves=1),
    )
    launches = launches_of([call], server, *traffic)
    assert len(launches) == len({launch.name for launch in launches}), [launch.key for launch in launches]


@pytest.mark.parametrize("server", [Server(), LATENTS], ids=["heads", "latents"])
def test_keys_are_read_16_bytes_at_a_time(server):
    """Element by element a warp would ask for memory eight times as often."""
    # `stored_attention` reads no keys, only bits of them.
    calls = OF_CACHES if server is LATENTS else (*OF_CACHES, *RECALLING[:-1])
    code = {launch.name: compiled(launch, 80).asm["ptx"] for launch in launches_of(calls, server)}
    assert {name for name, text in code.items() if "ld.global.b16" in text} == set()
    assert all("ld.global.v4.b32" in text for name, text in code.items() if "attention." in name)
