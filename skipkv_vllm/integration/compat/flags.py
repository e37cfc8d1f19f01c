"""Our flags on every vLLM command that takes engine arguments, and the configuration they become."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from ...config import CONFIG_KEY, KVPolicyConfig, flag_names, parse_json_object, shown_default
from ...core.errors import KVPolicyError
from .version import check_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.skipkv")

STEERED_LAYERS_KEY = f"{CONFIG_KEY}_steered_layers"
GATES_WIDTH_KEY = f"{CONFIG_KEY}_gates_width"
SCHEDULER = "skipkv_vllm.integration.scheduler.make_scheduler"
WORKERS = {
    "cpu": "skipkv_vllm.integration.cpu_worker.EvictingCPUWorker",
    "gpu": "skipkv_vllm.integration.gpu_worker.EvictingGPUWorker",
}
METAVARS = {
    "kv_policy": "NAME",
    "kv_policy_config": "JSON",
    "kv_trace_dir": "DIR",
    "kv_steering_vectors": "NAME=PATH",
    "kv_steering_default": "NAME",
}

FOR_STEERING_TOO = {
    "kv_batch_grouping",
    "kv_grouping_width",
    "kv_grouping_max_wait",
    "kv_prefix_eviction",
    "kv_trace_dir",
    "kv_check_integrity",
}
"""Fields that also apply to a server that steers without evicting."""

_added: set[str] = set()
"""Fields of `KVPolicyConfig` whose flags `add_flags` added."""


def has_policy(vllm_config: VllmConfig) -> bool:
    """Return whether this engine was configured with an active KV policy."""
    # Called on every server, including under a vLLM whose configuration is of another kind.
    additional = getattr(vllm_config, "additional_config", None)
    return isinstance(additional, dict) and CONFIG_KEY in additional


def policy_config(vllm_config: VllmConfig) -> KVPolicyConfig:
    """Return the KV policy that an engine was configured with."""
    assert isinstance(vllm_config.additional_config, dict)
    return KVPolicyConfig.parse(vllm_config.additional_config[CONFIG_KEY])


def update_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Convert our flags among parsed arguments into vLLM's, in place; a bad one ends the command with a message.

    In place, because a command with several API servers passes the parsed arguments to them, and they build the
    configuration before they load plugins.
    """
    given = {name: getattr(args, name) for name in _added if hasattr(args, name)}
    if not given:
        return args
    try:
        vars(args).update(engine_arguments(given, vars(args)))
    except KVPolicyError as error:
        print(f"vllm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of `KVPolicyConfig`; none if vLLM itself has one of these flags."""
    if taken := [flag for flag in flag_names().values() if flag in parser._option_string_actions]:
        logger.warning("SkipKV: --kv-policy is not available: this vLLM has its own flags %s", ", ".join(taken))
        return
    _added.update(KVPolicyConfig.model_fields)
    group = parser.add_argument_group(title="KVPolicyConfig", description=KVPolicyConfig.__doc__)
    for name, flag in flag_names().items():
        field = KVPolicyConfig.model_fields[name]
        # No default in the parser: only flags that were given may appear in the parsed arguments.
        help_text = f"{field.description} Default: {shown_default(name)}."
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is Literal:
            options["choices"] = get_args(field.annotation)
        elif get_origin(field.annotation) is list or name == "kv_steering_vectors":
            options |= {"nargs": "+", "metavar": METAVARS.get(name, "NAME")}
        elif field.annotation is int:
            options |= {"type": int, "metavar": "N"}
        elif field.annotation in (float, float | None):
            options |= {"type": float, "metavar": "X"}
        else:
            options["metavar"] = METAVARS.get(name, "VALUE")
        group.add_argument(flag, **options)


def engine_arguments(given: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """Merge policy options into vLLM's engine arguments.

    Args:
        given: `KVPolicyConfig` fields that the user set; `kv_policy_config` may be JSON text, `kv_steering_vectors` a
            list of NAME=PATH.
        engine: arguments of vLLM's `EngineArgs` or `LLM`; not modified.

    Returns:
        `engine`, with `additional_config`, `scheduler_cls` and `worker_cls` set if anything is evicted or steered.

    Raises:
        KVPolicyError: bad options, options without a policy, an untested vLLM, or a scheduler or
            worker class of the user's own.
    """
    given = dict(given)
    if isinstance(given.get("kv_policy_config"), str):
        given["kv_policy_config"] = parse_json_object("--kv-policy-config", given["kv_policy_config"])
    _check_has_effect(given)
    config = KVPolicyConfig.parse(given)
    if not config.is_active:
        return dict(engine)

    check_vllm()
    _check_classes(config, engine)
    from vllm.platforms import current_platform

    additional = dict(engine.get("additional_config") or {})
    additional[CONFIG_KEY] = config.model_dump()
    # vLLM looks up compiled code by its configuration, and the compiled code depends on these two.
    if config.steers:
        additional[STEERED_LAYERS_KEY] = sorted({vector.layer for vector in config.load_vectors()})
    if config.gates is not None:
        additional[GATES_WIDTH_KEY] = config.gates.width
    return engine | {
        "additional_config": additional,
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKERS["cpu" if current_platform.is_cpu() else "gpu"],
    }


def _check_has_effect(given: dict[str, Any]) -> None:
    """Refuse options of a policy without a policy."""
    for_eviction = [name for name in given if not name.startswith("kv_steering_")]
    if not for_eviction or "kv_policy" in given:
        return
    if given.get("kv_steering_vectors") and set(for_eviction) <= FOR_STEERING_TOO:
        return
    flags = ", ".join(flag_names()[name] for name in for_eviction)
    raise KVPolicyError(f"{flags} given without --kv-policy, so nothing would be evicted; add --kv-policy skipkv")


def _check_classes(config: KVPolicyConfig, engine: dict[str, Any]) -> None:
    """Refuse a scheduler or worker class of the user's own."""
    feature = f"kv_policy={config.kv_policy!r}" if config.evicts else "kv_steering_vectors"
    for kind, default, ours in (("scheduler", None, (SCHEDULER,)), ("worker", "auto", WORKERS.values())):
        found = engine.get(f"{kind}_cls", default)
        if found not in (default, *ours):
            raise KVPolicyError(
                f"{kind}_cls={found!r} cannot be combined with {feature}, which uses its own {kind}; drop one of "
                "the two"
            )
