"""vLLM's Ray executor without accelerators, for tests.

vLLM 0.32 asks Ray for the platform's device, and its CPU platform names none. Here workers ask for a resource of our
own. All else is vLLM's: the placement group, the actors, how they load plugins, and the way from the scheduler to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import ray
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

DEVICE = "cpu_worker"


class CPUWorkerProc(RayWorkerProc):
    """A worker whose device is its rank."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [self._init_kwargs["rank"]]


class CPURayExecutor(RayExecutorV2):
    """`distributed_executor_backend` of an engine whose workers are Ray actors on CPUs; see `cluster`."""

    def _init_executor(self) -> None:
        with (
            mock.patch.object(CpuPlatform, "ray_device_key", DEVICE),
            mock.patch.object(ray_executor_v2, "RayWorkerProc", CPUWorkerProc),
        ):
            super()._init_executor()


@contextmanager
def cluster(num_workers: int) -> Iterator[None]:
    """A Ray cluster of this machine with places for that many workers."""
    with mock.patch.dict(os.environ, {"RAY_USAGE_STATS_ENABLED": "0"}):
        ray.init(
            num_cpus=num_workers,
            resources={DEVICE: num_workers},
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()
