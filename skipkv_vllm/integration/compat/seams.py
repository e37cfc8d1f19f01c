"""The places where this package needs a seam that stock vLLM lacks, and the runtime hook used instead.

`patches/` has a small diff that adds each seam. Every use calls `is_public`, so the same package runs on stock vLLM
through hooks and on a patched one through seams.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from .version import located
from .watched import POOL_CHECK

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

    from ...core.reports import RecalledTokens

PLUGIN = "skipkv"
"""Our key in vLLM's free-form fields, and the name of the attributes used where these fields do not exist."""


class Seam(NamedTuple):
    """A place where this package connects to vLLM.

    Attributes:
        patch: number of the file in `patches/` that adds the seam.
        marker: `module:name` or `module:Class.name` that exists if vLLM has the seam; by first minor version of vLLM if
            it differs.
        hook: what happens at run time if it does not.
    """

    patch: str
    marker: str | dict[str, str]
    hook: str

    @property
    def symbol(self) -> str:
        """The marker in this vLLM."""
        return self.marker if isinstance(self.marker, str) else located(self.marker)


SEAMS = {
    "flags and configuration check": Seam(
        "0001",
        "vllm.plugins.engine_args:register_engine_args_plugin",
        "EngineArgs.add_cli_args, from_cli_args and create_engine_config are wrapped",
    ),
    "request check": Seam(
        "0002",
        "vllm.v1.engine.input_processor:InputProcessor.request_validators",
        "InputProcessor.process_inputs is wrapped, and __init__ for clients configured in another process",
    ),
    "orders to workers": Seam(
        "0003",
        "vllm.v1.core.sched.output:SchedulerOutput.extra",
        "an undeclared attribute of SchedulerOutput carries them",
    ),
    "reports to metrics": Seam(
        "0004", "vllm.v1.metrics.stats:SchedulerStats.extra", "SchedulerStats is declared again with one more field"
    ),
    "resident lengths, runner V1": Seam(
        "0005",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.num_evicted_tokens",
        "compute_slot_mapping and the attention groups' build_metadata are replaced",
    ),
    "resident lengths, runner V2": Seam(
        "0006",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.num_evicted_tokens",
        "prepare_attn and the attention groups' build_metadata are replaced",
    ),
    "model runner on CPU": Seam(
        "0007",
        "vllm.v1.worker.cpu_worker:CPUWorker._make_model_runner",
        "the runner that CPUWorker.init_device built is adapted afterwards",
    ),
    "size of the pool": Seam(
        "0008",
        {since: f"{name.partition(':')[0]}:kv_cache_memory_checks" for since, name in POOL_CHECK.items()},
        "_check_enough_kv_cache_memory is wrapped",
    ),
    "check before a response": Seam(
        "0009",
        "vllm.entrypoints.serve.engine.serving:BaseServing.request_validators",
        "BaseServing._check_model and BeamSearchOfflineMixin.beam_search are wrapped",
    ),
}


@functools.cache
def is_public(seam: str) -> bool:
    """Return whether this vLLM has a seam; imports the module that would have it."""
    module, _, path = SEAMS[seam].symbol.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The seam is missing only if this module or a parent package is; anything else is an error.
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    for name in path.split("."):
        # Not getattr: the class itself must define the method, not inherit it.
        if name not in vars(found):
            return False
        found = vars(found)[name]
    return True


def send_orders(output: SchedulerOutput, orders: Any) -> None:
    """Attach a step's orders to the scheduler's output for the workers."""
    if is_public("orders to workers"):
        output.extra = {PLUGIN: orders}
    else:
        # Survives pickling to worker processes.
        setattr(output, PLUGIN, orders)


def received_orders(output: SchedulerOutput) -> Any:
    """Return the orders that `send_orders` attached, or None."""
    if is_public("orders to workers"):
        return output.extra and output.extra.get(PLUGIN)
    return getattr(output, PLUGIN, None)


def send_recalled(output: Any, counts: RecalledTokens) -> Any:
    """Attach the counts to a runner's output for the scheduler, once it is ready; return the output."""
    from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

    if isinstance(output, ModelRunnerOutput):
        # Survives pickling, also on its way from worker processes.
        setattr(output, PLUGIN, counts)
    elif isinstance(output, AsyncModelRunnerOutput):
        # An instance attribute, because each runner has an output class of its own.
        output.get_output = lambda get=output.get_output: send_recalled(get(), counts)
    return output


def received_recalled(output: ModelRunnerOutput) -> RecalledTokens | None:
    """Return the counts that `send_recalled` attached, or None."""
    return getattr(output, PLUGIN, None)


def send_report(stats: SchedulerStats, report: dict[str, float]) -> None:
    """Attach the counts since the last report to vLLM's statistics."""
    if is_public("reports to metrics"):
        stats.extra = {PLUGIN: report}
    else:
        setattr(stats, PLUGIN, report)


def received_report(stats: SchedulerStats | None) -> dict[str, float] | None:
    """Return the report that `send_report` attached, or None."""
    if stats is not None and is_public("reports to metrics"):
        return stats.extra and stats.extra.get(PLUGIN)
    return getattr(stats, PLUGIN, None)
