"""Connect to vLLM once per process: flags and checks always, runtime hooks only where vLLM has no seam (`seams.py`)."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...core.auxiliary import auxiliary
from ...core.errors import KVPolicyError
from .flags import add_flags, has_policy, policy_config, update_arguments
from .pool import install_pool_check
from .refusals import check_config
from .request_checks import install_request_checks
from .responses import install_reports
from .seams import PLUGIN, is_public
from .speculation import check_speculation
from .version import check_version, check_vllm, is_tested, located
from .watched import POOL_CHECK
from .wrap import wrap

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class PolicyArguments:
    """Extend vLLM's `EngineArgs`: add our flags, convert them, and refuse unsupported configurations."""

    name = PLUGIN

    def add_cli_args(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags."""
        add_flags(parser)

    def update_args(self, args: argparse.Namespace) -> argparse.Namespace:
        """Convert them into vLLM's own engine arguments."""
        return update_arguments(args)

    def check_config(self, vllm_config: VllmConfig) -> None:
        """Refuse unsupported configurations, and prepare this process."""
        if has_policy(vllm_config):
            check_vllm()
            check_config(vllm_config, policy_config(vllm_config))
            check_speculation(vllm_config, policy_config(vllm_config))
            enable(vllm_config)


def install() -> None:
    """Add our flags to vLLM; change nothing else until a policy is requested. Idempotent.

    This runs under any vLLM, tested or not. The flags are added wherever vLLM's own flags are parsed in the known way;
    the version check then refuses `--kv-policy`.

    Raises:
        KVPolicyError: this vLLM parses its flags differently; nothing was changed.
    """
    _add_flags()
    check = located(POOL_CHECK)
    if check.partition(":")[0] in sys.modules and is_tested(check):
        # An engine core in its own process, which sizes its pool before it creates the scheduler.
        install_pool_check()


def _add_flags() -> None:
    if is_public("flags and configuration check"):
        from vllm.plugins.engine_args import register_engine_args_plugin

        register_engine_args_plugin(PolicyArguments())
        return
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise _no_flags(f"vllm.engine.arg_utils:EngineArgs cannot be imported ({error})") from None
    if not hasattr(EngineArgs, "_skipkv"):
        _wrap_engine_args(EngineArgs, PolicyArguments())


def _no_flags(cause: str) -> KVPolicyError:
    try:
        check_version()
    except KVPolicyError as error:
        cause = f"{error} ({cause})"
    return KVPolicyError(cause)


def _wrap_engine_args(cls: Any, plugin: PolicyArguments) -> None:
    # All or nothing: a flag that is parsed but never converted would be ignored silently.
    for name, kind in {"add_cli_args": staticmethod, "from_cli_args": classmethod}.items():
        if not isinstance(vars(cls).get(name), kind):
            raise _no_flags(f"vllm.engine.arg_utils:EngineArgs.{name} is no longer a {kind.__name__}")
    if not callable(getattr(cls, "create_engine_config", None)):
        raise _no_flags("vllm.engine.arg_utils:EngineArgs.create_engine_config is missing")
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
    """Prepare every client of an engine with a policy, even if another process built its configuration.

    Ray Serve builds it in another process, for example.
    """
    if is_public("request check") and is_public("reports to metrics"):
        # A client needs nothing else, and the checks pass without a policy; the engine core has checked vLLM.
        install_request_checks()
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
    """Prepare this process for a policy: API server, engine core or worker. Idempotent."""
    check_vllm()
    if not is_public("reports to metrics"):
        _extend_scheduler_stats()
    install_pool_check()
    install_request_checks()
    install_reports()


def _extend_scheduler_stats() -> None:
    """Add one field to vLLM's `SchedulerStats`, before any encoder or decoder for it is built.

    The statistics cross processes by msgspec, which encodes declared fields only.
    """
    from vllm.v1.metrics.stats import SchedulerStats

    if PLUGIN in SchedulerStats.__dataclass_fields__:
        return
    SchedulerStats.__annotations__[PLUGIN] = dict[str, float] | None
    setattr(SchedulerStats, PLUGIN, None)
    for spec in dataclasses.fields(SchedulerStats):
        # The decorator removed default factories from the class body; a second run needs them there.
        if spec.default_factory is not dataclasses.MISSING:
            setattr(SchedulerStats, spec.name, dataclasses.field(default_factory=spec.default_factory))
    for generated in ("__init__", "__repr__", "__eq__"):
        delattr(SchedulerStats, generated)
    dataclasses.dataclass(SchedulerStats)
