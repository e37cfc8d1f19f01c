"""Sleep mode on a CPU, where vLLM's worker ignores it: memory that a GPU would discard is overwritten.

vLLM's own `Worker.sleep` and `wake_up` run, on a backend that knows the pool of every allocation, as `CuMemAllocator`
does. Memory that wakes without a backup holds NaN, huge numbers and random integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from vllm import _custom_ops
from vllm.device_allocator import DEFERRABLE_TAGS
from vllm.device_allocator.sleep_mode_backend import SleepModeBackend
from vllm.v1.worker.gpu_worker import Worker

from skipkv_vllm.integration import cpu_worker

TAGS = ("weights", "kv_cache", "runtime")


class Pools(TorchDispatchMode):
    """Knows the pool of every storage. It keeps all storages alive, so that no address is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tag: str | None = None
        self._tags: dict[int, str | None] = {}
        self._held: dict[str | None, list[tuple[torch.dtype, UntypedStorage]]] = {}

    def tag_of(self, tensor: Tensor) -> str | None:
        """Return the pool of a tensor, or None."""
        return self._tags.get(tensor.untyped_storage().data_ptr())

    def holding(self, tag: str) -> list[tuple[torch.dtype, UntypedStorage]]:
        """Return the storages of a pool with their dtypes."""
        return self._held.get(tag, [])

    @contextmanager
    def allocate(self, tag: str) -> Iterator[None]:
        """Allocate inside a pool; the innermost one wins."""
        outer, self.tag = self.tag, tag
        try:
            if outer is None:
                with self:
                    yield
            else:
                yield
        finally:
            self.tag = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.lift_fresh.default:  # adopts the storage that `torch.tensor` has just allocated
            self._note((args, kwargs), None)
        result = func(*args, **(kwargs or {}))
        self._note(result, self.tag)
        return result

    def _note(self, values: Any, tag: str | None) -> None:
        for tensor in tree_iter(values):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self._tags:
                    self._tags[storage.data_ptr()] = tag
                    self._held.setdefault(tag, []).append((tensor.dtype, storage))


class Backend(SleepModeBackend):
    """Keeps and discards the same memory as `CuMemBackend`."""

    def __init__(self, pools: Pools) -> None:
        super().__init__()
        self.pools = pools
        self._asleep: dict[str, list[UntypedStorage]] = {}
        """backup by pool, empty if there is none"""

    def suspend(self, level: int = 1) -> None:
        backed_up = ("weights", "runtime") if level == 1 else ("runtime",)
        self._discard(TAGS, backed_up)

    def discard(self, tags: tuple[str, ...]) -> None:
        self._discard(tags, ())

    def _discard(self, tags: tuple[str, ...], backed_up: tuple[str, ...]) -> None:
        for tag in tags:
            held = self.pools.holding(tag)
            self._asleep[tag] = [storage.clone() for _, storage in held] if tag in backed_up else []
            for dtype, storage in held:
                values = torch.empty(0, dtype=dtype).set_(storage)
                if dtype.is_floating_point:
                    values.fill_(torch.nan)
                elif dtype.itemsize > 1:
                    values.random_()
                else:
                    # Pages are allocated as bytes. As float32 they are huge, not NaN: attention on CPUs multiplies
                    # the memory past a sequence by 0.
                    values.fill_(127)

    def resume(self, tags: list[str] | None = None) -> None:
        for tag in list(self._asleep):
            if tags is None or tag in tags or tag not in DEFERRABLE_TAGS:
                # The backup is empty if there is none.
                for (_, storage), saved in zip(self.pools.holding(tag), self._asleep.pop(tag), strict=False):
                    storage.copy_(saved)


class SleepingCPUWorker(cpu_worker.EvictingCPUWorker):
    """Our CPU worker with the sleep mode of GPUs."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        self.pools = Pools()
        self._sleep_mode_backend = Backend(self.pools)
        super().load_model(*args, **kwargs)

    def _maybe_get_memory_pool_context(self, tag: str) -> Any:
        return self.pools.allocate(tag)

    def sleep(self, level: int = 1) -> None:
        with patch.object(torch.accelerator, "get_memory_info", lambda: (0, 0)):
            Worker.sleep(self, level)

    wake_up = Worker.wake_up
    discard = Worker.discard


@contextmanager
def sleep_mode() -> Iterator[None]:
    """Let engines of this process that start inside sleep."""
    # oneDNN packs weights into memory of its own, and vLLM keeps their addresses in tensors.
    with (
        patch.object(cpu_worker, "EvictingCPUWorker", SleepingCPUWorker),
        patch.object(_custom_ops, "_supports_onednn", False),
    ):
        yield
