"""Model runners that report to the scheduler how many tokens came back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import compat

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object


class ReportingRunner(_Base):
    """Sends the counts of the runtime with the output of each step."""

    runtime: Any

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        counts = self.runtime.recalled
        return output if counts is None else compat.send_recalled(output, counts)
