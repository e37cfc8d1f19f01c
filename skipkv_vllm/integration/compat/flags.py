"""Flags on every vLLM command that takes engine arguments, and the same options offline."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any, Literal, get_args, get_origin

from ...config import CONFIG_KEY, KVPolicyConfig, flag_names, parse_json_object
from ...core.errors import KVPolicyError
from .version import check_vllm

logger = logging.getLogger("vllm.skipkv")

STEERED_LAYERS_KEY = f"{CONFIG_KEY}_steered_layers"
GATES_WIDTH_KEY = f"{CONFIG_KEY}_gates_width"
SCHEDULER = "skipkv_vllm.integration.scheduler.make_scheduler"
WORKERS = {
    "cpu": "skipkv_vllm.integration.cpu_worker.EvictingCPUWorker",
    "gpu": "skipkv_vllm.integration.gpu_worker.EvictingGPUWorker",
}
_METAVARS = {
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
"""Fields that mean something on a server that only steers."""

_added: set[str] = set()
"""fields of `KVPolicyConfig` whose flags are ours and not vLLM's own"""


def update_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Parsed arguments with the policy's flags worked in, in place; a bad one ends the command with a message.

    In place, because a command with several API servers hands them the parsed arguments: they make a configuration of
    them before they load plugins.
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
    """Add one flag per field of `KVPolicyConfig`; none where vLLM has one of these flags itself."""
    if taken := [flag for flag in flag_names().values() if flag in parser._option_string_actions]:
        logger.warning("SkipKV: --kv-policy is not available: this vLLM has flags of the name %s", ", ".join(taken))
        return
    _added.update(KVPolicyConfig.model_fields)
    group = parser.add_argument_group(title="KVPolicyConfig", description=KVPolicyConfig.__doc__)
    for name, flag in flag_names().items():
        field = KVPolicyConfig.model_fields[name]
        default = field.get_default(call_default_factory=True)
        # No default in the parser, so that a flag that was given can be told from one that was not.
        help_text = f"{field.description} Default: {default}."
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help_text.replace("%", "%%")}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is Literal:
            options["choices"] = get_args(field.annotation)
        elif get_origin(field.annotation) is list or name == "kv_steering_vectors":
            options |= {"nargs": "+", "metavar": _METAVARS.get(name, "NAME")}
        elif field.annotation is int:
            options |= {"type": int, "metavar": "N"}
        elif field.annotation in (float, float | None):
            options |= {"type": float, "metavar": "X"}
        else:
            options["metavar"] = _METAVARS[name]
        group.add_argument(flag, **options)


def engine_arguments(given: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments with the policy options that were given worked in.

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
    for_eviction = [name for name in given if not name.startswith("kv_steering_")]
    if (
        for_eviction
        and "kv_policy" not in given
        and not (given.get("kv_steering_vectors") and set(for_eviction) <= FOR_STEERING_TOO)
    ):
        flags = ", ".join(flag_names()[name] for name in for_eviction)
        raise KVPolicyError(f"{flags} given without --kv-policy, so nothing would be evicted; add --kv-policy skipkv")
    config = KVPolicyConfig.parse(given)
    if not config.is_active:
        return dict(engine)

    check_vllm()
    feature = f"kv_policy={config.kv_policy!r}" if config.evicts else "kv_steering_vectors"
    if engine.get("scheduler_cls") not in (None, SCHEDULER):
        raise KVPolicyError(
            f"scheduler_cls={engine['scheduler_cls']!r} cannot be combined with {feature}, "
            "which brings its own scheduler; drop one of the two"
        )
    if engine.get("worker_cls", "auto") not in ("auto", *WORKERS.values()):
        raise KVPolicyError(
            f"worker_cls={engine['worker_cls']!r} cannot be combined with {feature}, "
            "which brings its own worker; drop one of the two"
        )
    from vllm.platforms import current_platform

    additional = dict(engine.get("additional_config") or {})
    additional[CONFIG_KEY] = config.model_dump()
    # What is compiled depends on these, and vLLM finds compiled code by the configuration.
    if config.steers:
        additional[STEERED_LAYERS_KEY] = sorted({vector.layer for vector in config.load_vectors()})
    if config.gates is not None:
        additional[GATES_WIDTH_KEY] = config.gates.width
    return engine | {
        "additional_config": additional,
        "scheduler_cls": SCHEDULER,
        "worker_cls": WORKERS["cpu" if current_platform.is_cpu() else "gpu"],
    }
