"""Steering's flags, request options, refusals and counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipkv_vllm.banner import banner
from skipkv_vllm.capacity import ModelShape, Pool, capacity
from skipkv_vllm.config import KVPolicyConfig, RequestOptions
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.core.orders import SteeredRequest, Strength
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat.flags import SCHEDULER, STEERED_LAYERS_KEY
from skipkv_vllm.integration.metrics import EvictionStatLogger
from skipkv_vllm.scheduler.requests import Text
from skipkv_vllm.scheduler.stats import EvictionStats
from skipkv_vllm.steering import SteeringVector
from skipkv_vllm.steering.controller import Thoughts
from tests.unit.integration.compat.vllm_configs import make_vllm_config
from tests.unit.integration.engine import Engine
from tests.unit.integration.test_metrics import WITH_POLICY, record, registry, report, value  # noqa: F401
from tests.unit.integration.traffic import drive, finish_all


@pytest.fixture
def math(tmp_path: Path) -> str:
    """A vector's file, for a model of 4 layers and width 6."""
    path = tmp_path / "math.safetensors"
    SteeringVector(values=torch.ones(6), layer=2, num_layers=4, base_model="m", method="m").save(path)
    return str(path)


SERVER = KVPolicyConfig(kv_policy="rkv", kv_budget=100, kv_steering_vectors={"math": "/m", "code": "/c"})


# ---- the server


def test_defaults():
    config = KVPolicyConfig(kv_steering_vectors={"math": "/m"})
    assert (config.evicts, config.steers, config.is_active) == (False, True, True)
    assert not KVPolicyConfig().is_active
    assert KVPolicyConfig().kv_steering_default == "off"
    assert RequestOptions().strength(config) == Strength(1.0, 0.02, float("inf"))
    assert KVPolicyConfig.parse(config.model_dump()) == config


def test_vectors_are_name_and_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = KVPolicyConfig.parse({"kv_steering_vectors": ["a=x=y.safetensors", "b.1-c=/abs"]})
    assert config.kv_steering_vectors == {"a": str(tmp_path / "x=y.safetensors"), "b.1-c": "/abs"}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"kv_steering_vectors": ["math"]}, ["'math' is not NAME=PATH", "write e.g."]),
        ({"kv_steering_vectors": ["math="]}, ["'math=' is not NAME=PATH"]),
        ({"kv_steering_vectors": ["a=x", "a=y"]}, ["a is given twice"]),
        ({"kv_steering_vectors": ["off=x"]}, ["'off' is not allowed as a name"]),
        ({"kv_steering_vectors": ["a/b=x"]}, ["'a/b' is not allowed as a name", "letters, digits"]),
        ({"kv_steering_vectors": ["=x"]}, ["'' is not allowed as a name"]),
        ({"kv_steering_vectors": {"a": 3}}, ["kv_steering_vectors.a=3", "a text"]),
        ({"kv_steering_gamma": 0.5}, ["--kv-steering-gamma given without --kv-steering-vectors"]),
        ({"kv_steering_default": "math"}, ["--kv-steering-default given without --kv-steering-vectors"]),
        (
            {"kv_steering_vectors": {"a": "x"}, "kv_steering_default": "b"},
            ["kv_steering_default='b' is not registered", "off, a"],
        ),
        ({"kv_steering_vectors": {"a": "x"}, "kv_steering_alpha0": 11}, ["kv_steering_alpha0=11", "at most 10"]),
        ({"kv_steering_vectors": {"a": "x"}, "kv_steering_alpha0": float("nan")}, ["kv_steering_alpha0=nan", "finite"]),
        ({"kv_steering_vectors": {"a": "x"}, "kv_steering_gamma": -2}, ["kv_steering_gamma=-2", "at least -1"]),
        ({"kv_steering_vectors": {"a": "x"}, "kv_steering_alpha_max": 0}, ["kv_steering_alpha_max=0", "than 0"]),
        ({"kv_steering_vectors": {"a": "x"}, "kv_steering_interval": 0}, ["kv_steering_interval=0", "at least 1"]),
        (
            {"kv_steering_vectors": {"a": "x"}, "kv_steering_compat": "paper"},
            ["kv_steering_compat='paper'", "'published'"],
        ),
        # The former name of the published code's rules.
        (
            {"kv_steering_vectors": {"a": "x"}, "kv_steering_compat": "reference"},
            ["kv_steering_compat='reference'", "'default' or 'published'"],
        ),
    ],
)
def test_a_bad_option_is_refused(values, parts):
    with pytest.raises(KVPolicyError) as error:
        KVPolicyConfig.parse(values)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(KVPolicyError, match=r"kv_steering_vectors: gone: .*/gone.*no such file"):
        KVPolicyConfig(kv_steering_vectors={"gone": "/gone"}).load_vectors()


def test_flags_reach_the_engine(engine_args, math):
    args = engine_args(
        *("--kv-steering-vectors", f"math={math}", f"other={math}", "--kv-steering-default", "math"),
        *("--kv-steering-alpha0", "1.25", "--kv-steering-gamma", "0.05", "--kv-steering-alpha-max", "2"),
        *("--kv-steering-interval", "64", "--kv-steering-compat", "published"),
    )
    config = KVPolicyConfig.parse(args.additional_config["skipkv"])
    assert config == KVPolicyConfig(
        kv_steering_vectors={"math": math, "other": math},
        kv_steering_default="math",
        kv_steering_alpha0=1.25,
        kv_steering_gamma=0.05,
        kv_steering_alpha_max=2.0,
        kv_steering_interval=64,
        kv_steering_compat="published",
    )
    assert args.scheduler_cls == SCHEDULER
    # The places of the hooks must be part of the key of compiled code.
    assert args.additional_config[STEERED_LAYERS_KEY] == [2]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--kv-steering-vectors", "math=/nowhere"], ["math: ", "/nowhere", "no such file"]),
        (["--kv-steering-gamma", "0.1"], ["--kv-steering-gamma", "without --kv-steering-vectors"]),
        (["--kv-steering-vectors", "a=b", "--kv-budget", "100"], ["--kv-budget given without --kv-policy"]),
    ],
)
def test_bad_flags_end_the_command_with_a_message(engine_args, capsys, flags, parts):
    with pytest.raises(SystemExit):
        engine_args(*flags)
    message = capsys.readouterr().err
    for part in parts:
        assert part in message


def test_traces_need_no_eviction(engine_args, math, tmp_path):
    args = engine_args("--kv-steering-vectors", f"math={math}", "--kv-trace-dir", str(tmp_path))
    assert not KVPolicyConfig.parse(args.additional_config["skipkv"]).evicts


def test_waiting_requests_are_grouped_without_eviction(engine_args, math):
    grouping = {"kv_batch_grouping": "prefill-length", "kv_grouping_width": 64, "kv_grouping_max_wait": 2.5}
    flags = [word for name, value in grouping.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = engine_args("--kv-steering-vectors", f"math={math}", *flags)
    config = KVPolicyConfig.parse(args.additional_config["skipkv"])
    assert not config.evicts
    assert {name: getattr(config, name) for name in grouping} == grouping
    text = "\n".join(banner(config, None, 4096, is_async=True))
    assert "evicts nothing" in text
    assert "at most 64 tokens apart; a request 2.5 s or more past its turn is not overtaken" in text


@pytest.mark.parametrize("is_async", [False, True])
def test_the_banner_says_how_steps_are_scheduled(is_async):
    """vLLM warns about every scheduler class but its own that asynchronous scheduling may be off."""
    shape, pool = ModelShape(4, 4, 2, 32, 128, 503, 4), Pool(99, 16, 8, 4096, 2048)
    config = KVPolicyConfig(kv_steering_vectors={"math": "/m"})
    for lines in (
        banner(config, None, 4096, is_async=is_async),
        banner(SERVER, capacity(SERVER, shape, pool), 4096, is_async=is_async),
    ):
        (line,) = [line for line in lines if "asynchronous" in line]
        assert f"asynchronous scheduling is {'on' if is_async else 'off'}, as vLLM is configured" in line
        assert "warning about a custom scheduler class does not apply" in line


def test_the_banner_says_what_is_steered():
    config = KVPolicyConfig(kv_steering_vectors={"math": "/m"}, kv_steering_alpha_max=2.0)
    text = "\n".join(banner(config, None, 4096, is_async=True))
    assert "evicts nothing" in text
    assert (
        "steering vectors math, default off; alpha 1.0 + 0.02 per non-execution thought, at most 2.0, updated" in text
    )
    assert "at most 2.0" in text
    shape, pool = ModelShape(4, 4, 2, 32, 128, 503, 4), Pool(99, 16, 8, 4096, 2048)
    text = "\n".join(banner(SERVER, capacity(SERVER, shape, pool), 4096, is_async=False))
    assert "policy RKV" in text
    assert "steering vectors math, code" in text


# ---- a request


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"steering": "maths"}, ["steering='maths' is not registered", "off, math, code"]),
        ({"steering": "/m"}, ["steering='/m' is not registered"]),
        ({"steering": 1}, ["steering=1", "a text"]),
        ({"steering": "math", "steering_alpha0": 10.5}, ["steering_alpha0=10.5", "at most 10"]),
        ({"steering": "math", "steering_alpha0": float("inf")}, ["steering_alpha0=inf", "finite"]),
        ({"steering": "math", "steering_alpha0": "1"}, ["steering_alpha0='1'", "number"]),
        ({"steering": "math", "steering_gamma": True}, ["steering_gamma=True", "number"]),
        ({"steering": "math", "steering_gamma": float("nan")}, ["steering_gamma=nan", "finite"]),
        ({"steering_alpha0": 1.0}, ["steering_alpha0=1.0", "not steered", "math, code"]),
        ({"steering": "off", "steering_gamma": 0.1}, ["steering_gamma=0.1", "not steered"]),
        ({"steerings": "math"}, ["did you mean 'steering'"]),
        ({"kv_steering_vectors": "x=/etc/passwd"}, ["whole server", "--kv-steering-vectors"]),
        ({"kv_steering_alpha0": 1.0}, ["whole server", "--kv-steering-alpha0"]),
    ],
)
def test_a_bad_request_option_is_refused(extra, parts):
    with pytest.raises(KVPolicyError) as error:
        RequestOptions.parse(extra, SERVER, 500)
    for part in parts:
        assert part in str(error.value)


def test_a_request_chooses_its_vector_and_strength():
    options = RequestOptions.parse({"steering": "code", "steering_alpha0": 2, "steering_gamma": 0}, SERVER, 500)
    assert options.vector(SERVER) == "code"
    assert options.strength(SERVER) == Strength(2, 0, float("inf"))
    steers_all = KVPolicyConfig(kv_steering_vectors={"math": "/m"}, kv_steering_default="math")
    assert RequestOptions.parse({}, steers_all, 500).vector(steers_all) == "math"
    assert RequestOptions.parse({"steering": "off"}, steers_all, 500).vector(steers_all) is None
    assert RequestOptions.parse({}, SERVER, 500).vector(SERVER) is None


def test_a_server_without_vectors_takes_off_and_refuses_names():
    plain = KVPolicyConfig(kv_policy="rkv", kv_budget=100)
    assert RequestOptions.parse({"steering": "off"}, plain, 500).vector(plain) is None
    with pytest.raises(KVPolicyError, match="no steering vectors; start the server with --kv-steering-vectors"):
        RequestOptions.parse({"steering": "math"}, plain, 500)


@pytest.mark.parametrize("policy", ["streaming_llm", "finch", "trimkv"])
def test_a_server_that_only_steers_refuses_eviction(policy):
    config = KVPolicyConfig(kv_steering_vectors={"math": "/m"})
    assert RequestOptions.parse({"kv_policy": "full"}, config, 500).resolve_policy(config).name == "full"
    with pytest.raises(KVPolicyError, match=rf"kv_policy='{policy}' is not available.*--kv-policy"):
        RequestOptions.parse({"kv_policy": policy}, config, 500)


# ---- refusals


def model_for(math: str, **changes: Any) -> tuple[SimpleNamespace, KVPolicyConfig]:
    config = make_vllm_config()
    extra = {"get_hidden_size": lambda: 6, "get_total_num_hidden_layers": lambda: 4, "enforce_eager": True}
    vars(config.model_config).update(extra)
    vars(config.parallel_config).update({"use_sequence_parallel_moe": False, "enable_hc_sp": False})
    config.compilation_config = SimpleNamespace(inductor_compile_config={})
    for path, new in changes.items():
        part, name = path.split("__")
        setattr(getattr(config, part), name, new)
    return config, KVPolicyConfig(kv_steering_vectors={"math": math} if math else {})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_config__get_hidden_size": lambda: 8}, ["math: ", "hidden size is 6", "8"]),
        ({"model_config__get_total_num_hidden_layers": lambda: 5}, ["number of layers is 4", "5"]),
        ({"model_config__skip_tokenizer_init": True}, ["--skip-tokenizer-init"]),
        ({"parallel_config__use_sequence_parallel_moe": True}, ["sequence parallelism"]),
        ({"parallel_config__enable_hc_sp": True}, ["sequence parallelism"]),
        ({"parallel_config__prefill_context_parallel_size": 2}, ["context parallelism"]),
        ({"parallel_config__enable_dbo": True}, ["dual-batch overlap"]),
        ({"model_config__is_encoder_decoder": True}, ["encoder-decoder"]),
    ],
)
def test_an_unsupported_feature_is_refused(math, changes, parts):
    with pytest.raises(KVPolicyError) as error:
        compat.check_config(*model_for(math, **changes))
    for part in (*parts, "steering"):
        assert part in str(error.value)


def test_a_quantised_cache_is_not_refused(math):
    compat.check_config(*model_for(math, cache_config__cache_dtype="fp8"))


def test_frozen_coefficients_are_refused(math):
    config, policy = model_for(math)
    config.compilation_config.inductor_compile_config["max_autotune"] = True
    compat.check_config(config, policy)
    config.model_config.enforce_eager = False
    with pytest.raises(KVPolicyError, match="max_autotune"):
        compat.check_config(config, policy)


# ---- the prefix cache

FROM_9 = SteeredRequest("r0", 9, [], Strength(0, 0, 0))


def test_a_steered_request_publishes_its_prompt_and_no_more():
    engine = Engine(num_pages=40, seed=0)
    prompt = list(range(9))
    engine.arrive(prompt, None)
    engine.requests["r0"].steering = FROM_9
    drive(engine, 30)
    engine.manager.check_integrity()
    published = [block.block_hash is not None for block in engine.manager.req_to_blocks["r0"]]
    size = engine.manager.block_size
    assert published == [True] * (9 // size) + [False] * (len(published) - 9 // size)
    assert len(published) > 9 // size + 2
    # It holds also after a preemption, until the request ends.
    engine.preempt("r0")
    drive(engine, 20)
    engine.manager.check_integrity()
    assert sum(b.block_hash is not None for b in engine.manager.req_to_blocks["r0"]) == 9 // size
    finish_all(engine)


def test_check_integrity_finds_a_steered_page_that_was_published():
    engine = Engine(num_pages=40, seed=0)
    engine.arrive(list(range(9)), None)
    drive(engine, 30)
    engine.requests["r0"].steering = FROM_9
    with pytest.raises(AssertionError, match="is steered and published"):
        engine.manager.check_integrity()


# ---- metrics


def test_thoughts_are_exported_by_kind(registry):  # noqa: F811
    logger = EvictionStatLogger(WITH_POLICY)
    logger.log_engine_initialized()
    assert value(registry, "skipkv_thoughts_total", kind="transition") == 0
    stats = EvictionStats()
    for thoughts in (Thoughts(12, 30, 5, 2), Thoughts(1, 2, 3, 4)):
        request = record()
        request.thoughts = thoughts
        stats.finished(request, Text([], []))
    report(logger, **stats.take(0, 0, 0))
    assert value(registry, "skipkv_steered_tokens_total") == 13
    for kind, number in (("execution", 32), ("reflection", 8), ("transition", 6)):
        assert value(registry, "skipkv_thoughts_total", kind=kind) == number


def test_a_budget_is_refused_where_nothing_is_evicted():
    config = KVPolicyConfig(kv_steering_vectors={"math": "/math.safetensors"})
    with pytest.raises(KVPolicyError, match="kv_budget=64 has no effect, because this server evicts nothing"):
        RequestOptions.parse({"kv_budget": 64}, config, 500)
