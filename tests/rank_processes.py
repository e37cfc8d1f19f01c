"""Processes of an engine's ranks that start with vLLM imported, which takes each of them seconds otherwise.

vLLM spawns a fresh process per rank on CPUs. Here Python's fork server imports vLLM once, and each rank is a fork of it
with the environment that a fresh process would have had. It loads plugins, this package's too, by itself as always.
Ranks talk through sockets instead of shared memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

IMPORTED = [
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.model_executor.models.qwen2",
]
"""What ranks import, of either model runner."""


class RankProcess(ForkServerProcess):
    """A fork with this process's environment instead of the server's."""

    def __init__(self, *, target: Callable[..., None], kwargs: dict[str, Any], **options: Any) -> None:
        everything = {"environment": dict(os.environ), "target": target, "kwargs": kwargs}
        super().__init__(target=run, kwargs=everything, **options)


class RankContext(ForkServerContext):
    """Takes the place of the context that vLLM starts ranks with."""

    Process = RankProcess


def run(environment: Mapping[str, str], target: Callable[..., None], kwargs: dict[str, Any]) -> None:
    """Run a rank in its process."""
    os.environ.clear()
    os.environ.update(environment)
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    # In shared memory ranks wait for each other without giving up their cores, which others need.
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False
    target(**kwargs)


def use() -> None:
    """Start the ranks of all further engines of this process so."""
    from vllm.v1.executor import multiproc_executor

    context = RankContext()
    context.set_forkserver_preload(IMPORTED)
    multiproc_executor.get_mp_context = lambda: context
