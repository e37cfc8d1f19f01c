"""Flags on vLLM's own parser, and the same options offline."""

from __future__ import annotations

import dataclasses

import pytest
from vllm.engine.arg_utils import EngineArgs

from skipkv_vllm.config import KVPolicyConfig, flag_names, shown_default
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat.flags import SCHEDULER, WORKERS


def test_flags_reach_the_engine(engine_args):
    args = engine_args(
        *("--kv-policy", "skipkv", "--kv-budget", "256", "--kv-granularity", "sentence", "--no-kv-protect-prompt"),
        *("--kv-policy-config", '{"compat": "paper", "similarity_threshold": 0.97}'),
    )
    sent = KVPolicyConfig.parse(args.additional_config["skipkv"])
    assert sent == KVPolicyConfig(
        kv_policy="skipkv",
        kv_budget=256,
        kv_granularity="sentence",
        kv_protect_prompt=False,
        kv_policy_config={"compat": "paper", "similarity_threshold": 0.97},
    )
    assert args.scheduler_cls == SCHEDULER
    assert args.worker_cls in WORKERS.values()


def test_parsed_arguments_reach_a_process_without_the_plugin(parser, tmp_path):
    """Each of several API servers makes its configuration from the arguments that the command parsed."""
    parsed = parser.parse_args(["--model", str(tmp_path), "--kv-policy", "rkv"])
    here = EngineArgs.from_cli_args(parsed)
    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    elsewhere = EngineArgs(**{name: value for name, value in vars(parsed).items() if name in fields})
    assert elsewhere == here == EngineArgs.from_cli_args(parsed)
    assert "skipkv" in elsewhere.additional_config


def test_other_additional_config_is_kept(engine_args):
    args = engine_args("--kv-policy", "rkv", "--additional-config", '{"mine": 1}')
    assert set(args.additional_config) == {"mine", "skipkv"}


@pytest.mark.parametrize("flags", [(), ("--kv-policy", "full")])
def test_nothing_changes_without_a_policy(engine_args, parser, tmp_path, flags):
    plain = parser.parse_args(["--model", str(tmp_path)])
    names = [field.name for field in dataclasses.fields(EngineArgs) if hasattr(plain, field.name)]
    expected = EngineArgs(**{name: getattr(plain, name) for name in names})
    assert engine_args(*flags) == expected
    assert expected.scheduler_cls is None
    assert expected.worker_cls == "auto"
    assert "skipkv" not in (expected.additional_config or {})


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kv-policy", "nope"], ["kv_policy='nope'", "skipkv"]),
        (["--kv-budget", "100"], ["--kv-budget", "without --kv-policy", "add --kv-policy skipkv"]),
        (["--no-kv-protect-prompt"], ["--kv-protect-prompt", "without --kv-policy"]),
        (["--kv-policy", "rkv", "--kv-budget", "4"], ["kv_budget=4", "at least 9"]),
        (["--kv-policy", "rkv", "--kv-budget", "many"], ["--kv-budget", "many"]),
        (["--kv-policy", "rkv", "--kv-buffer", "0"], ["kv_buffer=0"]),
        (["--kv-policy", "rkv", "--kv-granularity", "layer"], ["--kv-granularity", "layer", "sentence"]),
        (
            ["--kv-policy", "rkv", "--kv-policy-config", "{mix: 1}"],
            ["--kv-policy-config", "{mix: 1}", "not valid JSON"],
        ),
        (["--kv-policy", "rkv", "--kv-policy-config", "[1]"], ["--kv-policy-config", "[1]", "not an object"]),
        (["--kv-policy", "rkv", "--kv-policy-config", '{"mixx": 1}'], ["'mixx'", "mix, pool"]),
        (["--kv-policy", "rkv", "--kv-policy-config", '{"mix": "a"}'], ["mix='a'", "float"]),
        (["--kv-policy", "full", "--kv-policy-config", '{"mix": 1}'], ["'mix'", "'full'"]),
        (["--kv-policy", "rkv", "--scheduler-cls", "my.Scheduler"], ["scheduler_cls='my.Scheduler'", "drop one"]),
        (["--kv-policy", "rkv", "--worker-cls", "my.Worker"], ["worker_cls='my.Worker'", "drop one"]),
    ],
)
def test_bad_flags_end_the_command_with_a_message(engine_args, capsys, flags, parts):
    with pytest.raises(SystemExit) as end:
        engine_args(*flags)
    assert end.value.code == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_a_users_own_classes_are_fine_without_a_policy(engine_args):
    assert engine_args("--worker-cls", "my.Worker").worker_cls == "my.Worker"


def test_every_flag_is_on_the_parser_with_its_default_in_the_help(parser):
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for name, flag in flag_names().items():
        assert f"Default: {shown_default(name)}." in actions[flag].help
    assert "Default: on." in actions["--kv-protect-prompt"].help
    assert actions["--no-kv-protect-prompt"] is actions["--kv-protect-prompt"]


def test_offline_arguments():
    given = {"kv_policy": "rkv", "kv_budget": 128, "kv_policy_config": {"mix": 0.2}}
    engine = {"dtype": "float32", "additional_config": {"mine": 1}}
    changed = compat.engine_arguments(given, engine)
    assert changed["dtype"] == "float32"
    assert changed["additional_config"]["mine"] == 1
    assert changed["additional_config"]["skipkv"]["kv_budget"] == 128
    assert engine == {"dtype": "float32", "additional_config": {"mine": 1}}, "the input is not modified"
    assert given["kv_policy_config"] == {"mix": 0.2}
    assert compat.engine_arguments({}, engine) == engine
    assert compat.engine_arguments({"kv_policy": "full"}, engine) == engine
    with pytest.raises(KVPolicyError, match="kv-budget given without --kv-policy"):
        compat.engine_arguments({"kv_budget": 128}, engine)
