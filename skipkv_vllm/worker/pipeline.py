"""What a worker does differently where it is one stage of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class StageWorker(_Base):
    """Carries out a step's orders before it waits for the previous stage.

    The last stage tells the others about sentences at a compaction. If it waited for their hidden states first, they
    would wait for each other.
    """

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.parallel_config.pipeline_parallel_size > 1:
            self._begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def _begin_step(self, scheduler_output: Any) -> None:
        self.model_runner.begin_step(scheduler_output)
