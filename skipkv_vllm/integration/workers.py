"""What our workers do differently from vLLM's on every platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class EvictingWorker(_Base):
    """Builds the runtime, and carries out a step's orders before it waits for the previous stage of a pipeline."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # Sleep level 2 discards the pool of the weights. This pool is backed up at every level.
        with self._maybe_get_memory_pool_context(tag="runtime"):
            self.model_runner.build_runtime()

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.parallel_config.pipeline_parallel_size > 1:
            # The last stage tells the others about sentences at a compaction. If it waited for their hidden states
            # first, they would wait for each other.
            self._begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def _begin_step(self, scheduler_output: Any) -> None:
        self.model_runner.begin_step(scheduler_output)
