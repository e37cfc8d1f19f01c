"""No hook of a step makes the host wait for the device. A pretended GPU shows it: its tensors have no content.

A step that needs content on the host, or a shape that depends on content, fails; so does a copy that PyTorch could not
make in the background. On a GPU, `torch.cuda.set_sync_debug_mode` finds the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skipkv_vllm import ops
from skipkv_vllm.config import KVPolicyConfig
from skipkv_vllm.ops.schema import NAMESPACE
from skipkv_vllm.policies import policy_names
from skipkv_vllm.worker.warm_up import warm_up
from tests.simulation import HIDDEN, LAYERS, gates_file
from tests.simulation import worker as simulated
from tests.simulation.pool import Pool
from tests.unit.worker.test_methods import PAPER

GPU = torch.device("meta")
WITHOUT_LOOKAHEAD = [name for name in policy_names() if name not in ("full", "laq", "finch")]


class WaitError(Exception):
    """The host would have waited for the device."""


class WaitCheck(TorchDispatchMode):
    """Raises `WaitError` for a copy between host and device that blocks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            is_background = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if source.device != found.device and source.numel() and not is_background:
                raise WaitError(f"{func} copies {tuple(source.shape)} from {source.device} to {found.device}")
        return found


class ListCheck(TorchFunctionMode):
    """Raises `WaitError` if numbers of the host become a tensor on the device; PyTorch copies them and waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and found.device == GPU and not isinstance(args[0], torch.Tensor):
            raise WaitError(f"{func.__name__}({args[0]!r}) on the device")
        return found


@contextmanager
def pretended_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "CPU", GPU)
        patch.setattr(ops, "function", lambda name, *_: getattr(getattr(torch.ops, NAMESPACE), name))
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        yield


def runtime(config: KVPolicyConfig) -> Any:
    with GPU:
        pool = Pool("gpu", num_layers=LAYERS, num_blocks=80, page_size=4, ratio=1, chance=random.Random(0))
    worker = simulated.Worker(config, pool, num_rows=3, max_length=200, max_tokens=64)
    assert {each.device.type for each in tree_leaves(worker.cache.pages.caches)} == {"meta"}
    return worker.runtime


def config_of(policy: str, granularity: str) -> KVPolicyConfig:
    parameters = {"trimkv": {"gates": gates_file()}, "paper": PAPER}.get(policy, {})
    return KVPolicyConfig(
        kv_policy="skipkv" if policy == "paper" else policy,
        kv_policy_config=parameters,
        kv_budget=64,
        kv_buffer=8,
        kv_window=4,
        kv_granularity=granularity,
    )


@pytest.mark.parametrize("granularity", ["head", "sentence"])
@pytest.mark.parametrize("policy", [*WITHOUT_LOOKAHEAD, "paper"])
def test_no_step_waits(policy: str, granularity: str) -> None:
    """The warm-up has every kind of step: a prefill, a decode, an accumulation and compactions of one and of two."""
    config = config_of(policy, granularity)
    with pretended_gpu():
        made = runtime(config)
        with WaitCheck(), ListCheck():
            warm_up(made, hidden_size=HIDDEN, dtype=torch.float32, max_length=200)


def test_the_check_finds_what_waits() -> None:
    with pretended_gpu(), WaitCheck(), ListCheck():
        ring = torch.zeros(4, device=GPU)
        with pytest.raises(RuntimeError, match="meta"):
            bool(ring.any())
        with pytest.raises(RuntimeError, match="meta"):
            ring.tolist()
        with pytest.raises(NotImplementedError, match="nonzero"):
            ring.nonzero()
        with pytest.raises(NotImplementedError, match="nonzero"):
            ring[ring > 0]
        with pytest.raises(WaitError):
            torch.tensor([1, 2], device=GPU)
        with pytest.raises(WaitError):
            torch.zeros(3).to(GPU)
        with pytest.raises(NotImplementedError, match="meta"):
            ring.cpu()
