"""Join vLLM once per process: the checks always, the hooks only where vLLM has no seam (see `public.py`)."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...config import CONFIG_KEY, KVPolicyConfig, RequestOptions
from ...core.auxiliary import auxiliary
from ...core.errors import KVPolicyError
from .entries import PYTHON, as_bad_request, beam_search_error, check_body, names_of
from .flags import add_flags, update_arguments
from .pool import POOL_CHECK, check_fits_alone, install_pool_check
from .public import PLUGIN, is_public
from .refusals import check_config
from .reports import install_reports
from .version import check_version, check_vllm, is_tested
from .wrap import wrap

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest


def has_policy(vllm_config: VllmConfig) -> bool:
    """Whether this engine was configured with an active KV policy."""
    # Asked of every server, also under a vLLM whose configuration is another one.
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, dict) and CONFIG_KEY in additional


def policy_config(vllm_config: VllmConfig) -> KVPolicyConfig:
    """The KV policy that an engine was configured with."""
    assert isinstance(vllm_config.additional_config, dict)
    return KVPolicyConfig.parse(vllm_config.additional_config[CONFIG_KEY])


class PolicyArguments:
    """What vLLM's `EngineArgs` learns from us: flags, what they become, and which configurations are refused."""

    name = PLUGIN

    def add_cli_args(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags."""
        add_flags(parser)

    def update_args(self, args: argparse.Namespace) -> argparse.Namespace:
        """Turn them into engine arguments that vLLM knows."""
        return update_arguments(args)

    def check_config(self, vllm_config: VllmConfig) -> None:
        """Refuse what is not supported, and get this process ready."""
        if has_policy(vllm_config):
            check_vllm()
            check_config(vllm_config, policy_config(vllm_config))
            enable(vllm_config)


def install() -> None:
    """Give vLLM the flags. Changes nothing else until a policy is asked for. Idempotent.

    Nothing here may assume the vLLM that was tested: the flags go wherever vLLM's own are parsed as we know it, and
    `--kv-policy` is refused there by its version.

    Raises:
        KVPolicyError: this vLLM parses its flags in another way; it is left alone.
    """
    _add_flags()
    if "vllm.v1.core.kv_cache_utils" in sys.modules and is_tested(POOL_CHECK):
        # An engine core in a process of its own, which sizes its pool before it makes the scheduler.
        install_pool_check(has_policy, policy_config)


def _add_flags() -> None:
    if is_public("flags and configuration check"):
        from vllm.plugins.engine_args import register_engine_args_plugin

        register_engine_args_plugin(PolicyArguments())
        return
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise _without_flags(f"vllm.engine.arg_utils:EngineArgs cannot be imported ({error})") from None
    if not hasattr(EngineArgs, "_skipkv"):
        _wrap_engine_args(EngineArgs, PolicyArguments())


def _without_flags(cause: str) -> KVPolicyError:
    try:
        check_version()
    except KVPolicyError as error:
        cause = f"{error} ({cause})"
    return KVPolicyError(cause)


def _wrap_engine_args(cls: Any, plugin: PolicyArguments) -> None:
    # All or nothing: flags that nobody reads would be ignored without a word.
    for name, kind in {"add_cli_args": staticmethod, "from_cli_args": classmethod}.items():
        if not isinstance(vars(cls).get(name), kind):
            raise _without_flags(f"vllm.engine.arg_utils:EngineArgs.{name} is no longer a {kind.__name__}")
    if not callable(getattr(cls, "create_engine_config", None)):
        raise _without_flags("vllm.engine.arg_utils:EngineArgs.create_engine_config is gone")
    add, convert, create = cls.add_cli_args, cls.from_cli_args.__func__, cls.create_engine_config

    @functools.wraps(add)
    def add_cli_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.ArgumentParser:
        parser = add(parser, *args, **kwargs)
        with auxiliary("add --kv-policy to vLLM's flags"):
            plugin.add_cli_args(parser)
        return parser

    @functools.wraps(convert)
    def from_cli_args(cls: type, args: argparse.Namespace, *further: Any, **kwargs: Any) -> Any:
        return convert(cls, plugin.update_args(args), *further, **kwargs)

    @functools.wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        vllm_config = create(self, *args, **kwargs)
        plugin.check_config(vllm_config)
        return vllm_config

    cls.add_cli_args = staticmethod(add_cli_args)
    cls.from_cli_args = classmethod(from_cli_args)
    cls.create_engine_config = create_engine_config
    cls._skipkv = True


def install_client_check() -> None:
    """Get every client of an engine with a policy ready.

    Its configuration may have been made in another process, as Ray Serve does it.
    """
    if is_public("request check") and is_public("reports to metrics"):
        # All that a client needs, and without a policy it does nothing; the engine core has looked at vLLM.
        _check_requests()
        return
    if not is_tested("vllm.v1.engine.input_processor:InputProcessor.__init__"):
        return
    from vllm.v1.engine.input_processor import InputProcessor

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
            if has_policy(vllm_config):
                enable(vllm_config)
            original(self, vllm_config, *args, **kwargs)

        return init

    wrap(InputProcessor, "__init__", around)


def enable(vllm_config: VllmConfig) -> None:
    """Get this process ready: API server, engine core or worker. Idempotent."""
    check_vllm()
    if not is_public("reports to metrics"):
        _extend_scheduler_stats()
    install_pool_check(has_policy, policy_config)
    _check_requests()
    install_reports()


def _extend_scheduler_stats() -> None:
    """Give vLLM's `SchedulerStats` one more field, before any encoder or decoder for it is built.

    The statistics cross processes by msgspec, which sees declared fields only.
    """
    from vllm.v1.metrics.stats import SchedulerStats

    if PLUGIN in SchedulerStats.__dataclass_fields__:
        return
    SchedulerStats.__annotations__[PLUGIN] = dict[str, float] | None
    setattr(SchedulerStats, PLUGIN, None)
    for spec in dataclasses.fields(SchedulerStats):
        # The decorator removed default factories from the class body; they must be there to run it again.
        if spec.default_factory is not dataclasses.MISSING:
            setattr(SchedulerStats, spec.name, dataclasses.field(default_factory=spec.default_factory))
    for generated in ("__init__", "__repr__", "__eq__"):
        delattr(SchedulerStats, generated)
    dataclasses.dataclass(SchedulerStats)


def _check_requests() -> None:
    """Check a request once vLLM has settled its prompt, `max_tokens` and whether it goes on; a bad one is HTTP 400."""
    from vllm.v1.engine.input_processor import InputProcessor

    _check_bodies()
    _check_beam_search()
    if is_public("request check"):
        if check_request not in InputProcessor.request_validators:
            InputProcessor.request_validators.append(check_request)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def process(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            check_request(self.vllm_config, request)
            return request

        return process

    wrap(InputProcessor, "process_inputs", around)


def check_request(vllm_config: VllmConfig, request: EngineCoreRequest) -> None:
    """Refuse a request with bad options of ours, or one that could never be finished.

    Raises:
        VLLMValidationError: naming the field, the value and what is allowed.
    """
    params = request.sampling_params
    if params is None or not has_policy(vllm_config):
        return
    config = policy_config(vllm_config)
    with as_bad_request(names_of(request.request_id)):
        options = RequestOptions.parse(params.extra_args, config, vllm_config.model_config.max_model_len)
        if request.resumable:
            options.check_streaming()
        check_fits_alone(vllm_config, config, request, options)


def _check_bodies() -> None:
    """Check the body of a request before its response begins.

    vLLM makes the engine's request of it later: a streamed response has by then begun as HTTP 200.
    """
    from vllm.entrypoints.serve.engine.serving import BaseServing

    if is_public("check before a response"):
        if check_served not in BaseServing.request_validators:
            BaseServing.request_validators.append(check_served)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        async def check_model(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm.exceptions import VLLMValidationError

            try:
                check_served(self, request)
            except VLLMValidationError as error:
                return self.create_error_response(error)
            return await original(self, request, *args, **kwargs)

        return check_model

    wrap(BaseServing, "_check_model", around)


def check_served(serving: Any, body: Any) -> None:
    """Refuse a body that asks for what a server with a policy does not do.

    Args:
        serving: the handler of an endpoint.
        body: the request as it came.

    Raises:
        VLLMValidationError: naming the field, the value and what is allowed.
    """
    # What has no engine only turns text into tokens or back.
    vllm_config = getattr(getattr(serving, "engine_client", None), "vllm_config", None)
    if vllm_config is not None and has_policy(vllm_config):
        check_body(body, policy_config(vllm_config), vllm_config.model_config.max_model_len)


def _check_beam_search() -> None:
    """Refuse beam search offline; `check_body` does so on a server."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin

    if is_public("check before a response"):
        if check_beam_search not in BeamSearchOfflineMixin.beam_search_validators:
            BeamSearchOfflineMixin.beam_search_validators.append(check_beam_search)
        return

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
            check_beam_search(self.llm_engine.vllm_config)
            return original(self, *args, **kwargs)

        return beam_search

    wrap(BeamSearchOfflineMixin, "beam_search", around)


def check_beam_search(vllm_config: VllmConfig) -> None:
    """Refuse beam search on an engine with a policy.

    Raises:
        VLLMValidationError: with the reason and the ways out.
    """
    if has_policy(vllm_config):
        with as_bad_request(PYTHON):
            raise beam_search_error(policy_config(vllm_config), "LLM.beam_search", "LLM.generate takes the options")
