"""vLLM's GPU worker with eviction."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from .build import without_sidecar
from .runners import adapt_runner
from .workers import EvictingWorker


class EvictingGPUWorker(EvictingWorker, Worker):
    """`worker_cls` on GPU platforms."""

    def _make_model_runner(self) -> Any:
        runner = super()._make_model_runner()
        adapt_runner(runner, self.vllm_config, self.use_v2_model_runner)
        return runner

    def determine_available_memory(self) -> int:
        return without_sidecar(super().determine_available_memory(), self.vllm_config)
