"""vLLM's CPU worker with eviction."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.worker.cpu_worker import CPUWorker

from . import compat
from .workers import EvictingWorker, adapt_runner


class EvictingCPUWorker(EvictingWorker, CPUWorker):
    """`worker_cls` on CPU platforms."""

    def init_device(self) -> None:
        # The kernel requires each process to request AMX before its first tile instruction. vLLM 0.32 does not, and
        # bfloat16 attention then dies with SIGILL.
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        super().init_device()
        if not compat.is_public("model runner on CPU"):
            adapt_runner(self.model_runner, self.vllm_config, self.use_v2_model_runner)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        if not self.use_v2_model_runner and not get_pp_group().is_first_rank:
            # vLLM 0.32 allocates the input of a later stage in the warm-up, which an eager model on CPU skips.
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
