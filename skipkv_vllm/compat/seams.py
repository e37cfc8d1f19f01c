"""The few places where vLLM has no official seam: wrapped once per process, only when a policy is on."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from ..config import CONFIG_KEY, KVPolicyConfig, RequestOptions
from ..errors import KVPolicyError
from .gate import check_signatures, check_version
from .refusals import check_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def has_policy(vllm_config: VllmConfig) -> bool:
    """Whether this engine was configured with an active KV policy."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and CONFIG_KEY in additional


def policy_config(vllm_config: VllmConfig) -> KVPolicyConfig:
    """The KV policy that an engine was configured with."""
    assert isinstance(vllm_config.additional_config, dict)
    return KVPolicyConfig.parse(vllm_config.additional_config[CONFIG_KEY])


def install_config_check() -> None:
    """Make every engine configuration with a policy pass the refusals and switch the seams on."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if hasattr(original, "_skipkv"):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        vllm_config = original(self, *args, **kwargs)
        if has_policy(vllm_config):
            check_config(vllm_config, policy_config(vllm_config))
            enable(vllm_config)
        return vllm_config

    create_engine_config._skipkv = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def enable(vllm_config: VllmConfig) -> None:
    """Switch the seams on in this process: API server, engine core or worker. Idempotent."""
    check_version()
    check_signatures()
    _extend_scheduler_stats()
    _validate_request_options()


def _extend_scheduler_stats() -> None:
    """Give vLLM's `SchedulerStats` one more field, before any encoder or decoder for it is built.

    The statistics cross processes by msgspec, which sees declared fields only.
    """
    from vllm.v1.metrics.stats import SchedulerStats

    if CONFIG_KEY in SchedulerStats.__dataclass_fields__:
        return
    SchedulerStats.__annotations__[CONFIG_KEY] = dict[str, float] | None
    setattr(SchedulerStats, CONFIG_KEY, None)
    for spec in dataclasses.fields(SchedulerStats):
        # The decorator removed default factories from the class body; they must be there to run it again.
        if spec.default_factory is not dataclasses.MISSING:
            setattr(SchedulerStats, spec.name, dataclasses.field(default_factory=spec.default_factory))
    for generated in ("__init__", "__repr__", "__eq__"):
        delattr(SchedulerStats, generated)
    dataclasses.dataclass(SchedulerStats)


def _validate_request_options() -> None:
    """Check a request's options where vLLM checks its own, so that a bad one is HTTP 400."""
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor._validate_params
    if hasattr(original, "_skipkv"):
        return

    @functools.wraps(original)
    def _validate_params(self: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if has_policy(self.vllm_config) and isinstance(params, SamplingParams):
            try:
                RequestOptions.parse(
                    params.extra_args, policy_config(self.vllm_config), self.model_config.max_model_len
                )
            except KVPolicyError as error:
                from vllm.exceptions import VLLMValidationError

                raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        return original(self, params, *args, **kwargs)

    _validate_params._skipkv = True  # type: ignore[attr-defined]
    InputProcessor._validate_params = _validate_params
