"""The parts of our workers that are the same on every platform.

The worker classes have a module each (`cpu_worker`, `gpu_worker`): vLLM's CPU worker replaces functions of PyTorch when
it is imported, so it must not be imported on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..worker.warm_up import warm_up
from . import compat
from .build import left_for_kv
from .reporting import ReportingRunner
from .runner_v1 import EvictingRunnerV1, HookedRunnerV1
from .runner_v2 import EvictingRunnerV2, HookedRunnerV2

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker as _Base
else:
    _Base = object


class EvictingWorker(_Base):
    """Worker that builds the runtime, and carries out a step's orders before it waits for the previous stage."""

    def _make_model_runner(self) -> Any:
        runner = super()._make_model_runner()
        adapt_runner(runner, self.vllm_config, self.use_v2_model_runner)
        return runner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # Sleep level 2 discards the memory pool of the weights. This pool is backed up at every level.
        with self._maybe_get_memory_pool_context(tag="runtime"):
            self.model_runner.build_runtime()

    def determine_available_memory(self) -> int:
        return left_for_kv(super().determine_available_memory(), self.vllm_config)

    @torch.inference_mode()
    def compile_or_warm_up_model(self) -> Any:
        # Before vLLM captures graphs, and as a part of the start-up that it reports.
        model = self.model_config
        warm_up(
            self.model_runner.runtime,
            hidden_size=model.get_hidden_size(),
            dtype=model.dtype,
            max_length=model.max_model_len,
        )
        return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: Any) -> Any:
        if self.parallel_config.pipeline_parallel_size > 1:
            # At a compaction or swap the last stage sends sentences to the others. If it first waited for their hidden
            # states, the stages would wait for each other.
            self._begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    @torch.inference_mode()
    def _begin_step(self, scheduler_output: Any) -> None:
        self.model_runner.begin_step(scheduler_output)


def adapt_runner(runner: Any, vllm_config: Any, is_v2: bool) -> None:
    """Turn a new model runner of vLLM into an evicting one.

    Its class is replaced by a subclass, because each platform has runner classes of its own.
    """
    compat.enable(vllm_config)
    adapter: type
    # The public seams give the same lengths to all layers, and none to drafters.
    has_one_group = not compat.may_have_several_groups(vllm_config) and vllm_config.speculative_config is None
    if is_v2:
        is_public = has_one_group and compat.is_public("resident lengths, runner V2")
        adapter = EvictingRunnerV2 if is_public else HookedRunnerV2
    else:
        is_public = has_one_group and compat.is_public("resident lengths, runner V1")
        adapter = EvictingRunnerV1 if is_public else HookedRunnerV1
    # What came back is known to the workers only.
    reporting = (ReportingRunner,) if compat.policy_config(vllm_config).recalls else ()
    bases = (adapter, *reporting, type(runner))
    runner.__class__ = type(f"Evicting{type(runner).__name__}", bases, {})
