"""The engines that are compared: vLLM's arguments of each, at equal memory for KV."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from skipkv_vllm import KVPolicyError
from skipkv_vllm.capacity import ModelShape, shape_of
from skipkv_vllm.cli.plan import DTYPES
from skipkv_vllm.config import KVPolicyConfig

from .drafts import NGRAM
from .lengths import Offered

PRODUCTION, SAME = "full, production", "full, same settings"
GROUPED, SPECULATIVE = ", grouped", ", n-gram"


class Arm(NamedTuple):
    """An engine with a share of the blocks that full KV needs for the whole load."""

    name: str
    pool: float

    @property
    def evicts(self) -> bool:
        """Whether it has a policy."""
        return self.name.removesuffix(SPECULATIVE) not in (PRODUCTION, SAME)


def model_shape(args: argparse.Namespace) -> ModelShape:
    """The shape of the served model, with its overrides."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model).get_text_config()
    config.update(args.hf_overrides)
    return shape_of(config, ranks=1, element_size=DTYPES[args.dtype])


def policy_config(args: argparse.Namespace) -> KVPolicyConfig:
    """The policy that is compared with full KV."""
    return KVPolicyConfig.parse(
        {
            "kv_policy": args.policy,
            "kv_budget": args.budget,
            "kv_buffer": args.buffer,
            "kv_protect_prompt": not args.no_protect_prompt,
            "kv_policy_config": args.policy_config,
        }
    )


def pool_pages(args: argparse.Namespace, arm: Arm, pages: int) -> int:
    """Pages of an arm whose pool has the memory of `pages` pages of full KV: with a policy, positions cost some."""
    if not arm.evicts:
        return pages
    return model_shape(args).left_for_kv(pages, policy_config(args).needs)


def engine_arguments(args: argparse.Namespace, arm: Arm, load: Sequence[Offered], pages: int) -> dict[str, Any]:
    """Arguments of `skipkv_vllm.LLM` for an arm.

    Args:
        args: the command line.
        arm: which.
        load: decides on the longest request.
        pages: pages of full KV that its memory holds.
    """
    longest = max(each.length for each in load) + 1
    arguments: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "load_format": args.load_format,
        "hf_overrides": args.hf_overrides,
        "block_size": args.block_size,
        "max_model_len": longest,
        "num_gpu_blocks_override": pool_pages(args, arm, pages) + 1,  # one is vLLM's null block
        "enforce_eager": args.eager,
        "disable_log_stats": True,
    }
    if args.tokenizer:
        arguments["tokenizer"] = args.tokenizer
    if arm.name == PRODUCTION:
        return arguments
    arguments |= {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "enable_prefix_caching": args.prefix_caching,
    }
    if arm.evicts:
        given = policy_config(args)
        fields = ("kv_policy", "kv_budget", "kv_buffer", "kv_protect_prompt")
        arguments |= {name: getattr(given, name) for name in fields}
        arguments["kv_policy_config"] = given.kv_policy_config
    if arm.name.endswith(SPECULATIVE):
        arguments["speculative_config"] = NGRAM
    if arm.name.endswith(GROUPED):
        arguments |= {
            "kv_batch_grouping": "prefill-length",
            "kv_grouping_width": args.grouping_width,
            "kv_grouping_max_wait": args.grouping_max_wait,
        }
    return arguments


def add_engine_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the flags that `engine_arguments` reads."""
    group = parser.add_argument_group("engines")
    group.add_argument("--model", default=model)
    group.add_argument("--tokenizer", help="default: the model's")
    group.add_argument("--load-format", default="auto", help='"dummy" for random weights of a real configuration')
    group.add_argument("--hf-overrides", type=json.loads, default={}, metavar="JSON", help="e.g. fewer layers")
    group.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    group.add_argument("--block-size", type=int, default=32)
    group.add_argument("--max-num-seqs", type=int, default=64)
    group.add_argument("--max-num-batched-tokens", type=int, default=2048)
    group.add_argument(
        "--prefix-caching", action="store_true", help='also where the settings are the policy\'s; "production" has it'
    )
    group.add_argument("--eager", action="store_true", help="no compilation and no graphs")
    group.add_argument("--policy", default="skipkv")
    group.add_argument("--policy-config", type=json.loads, default={}, metavar="JSON")
    group.add_argument("--budget", type=int, default=192)
    group.add_argument("--buffer", type=int, default=64)
    group.add_argument("--no-protect-prompt", action="store_true", help="evict the prompt too, as the paper does")
    group.add_argument("--grouping-width", type=int, default=32)
    group.add_argument("--grouping-max-wait", type=float, default=1.0)


def check_engine_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with an error if the flags, including `--pools`, give no engines that can be compared."""
    if args.policy == "full":
        parser.error("--policy full: full KV is measured anyway; name the method to compare it with")
    if not all(pool > 0 for pool in args.pools):
        parser.error(f"--pools {args.pools} must be above 0")
    try:
        policy_config(args)
    except KVPolicyError as error:
        parser.error(str(error))
