"""vLLM's GPU worker with eviction."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from .workers import EvictingWorker


class EvictingGPUWorker(EvictingWorker, Worker):
    """`worker_cls` on GPU platforms."""
