"""Refuse runs that measured nothing: a policy that should have evicted and did not, or a vector never added."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean

from skipkv_vllm.evaluation.figures import FULL

from .grid import Arm, Settings
from .samples import Sample

SHOWN = 10


def must_have_compacted(sample: Sample, settings: Settings) -> bool:
    """Return whether the sample is long enough that it must have been compacted.

    The last step that generates token N of a prompt of P starts with P + N - 2 tokens computed, and a request
    that has reached its bound is compacted when a step starts.
    """
    if sample.policy == FULL:
        return False
    bound = settings.limits(sample.policy, sample.budget, sample.prompt_tokens).bound
    return sample.prompt_tokens + sample.completion_tokens - 2 >= bound


def failures(samples: Iterable[Sample], settings: Settings) -> list[str]:
    """List the reasons why a run does not count, a line per sample or arm; empty for a good run."""
    found = []
    arms: dict[Arm, list[Sample]] = defaultdict(list)
    for sample in samples:
        arms[sample.arm].append(sample)
        if sample.policy == FULL and sample.compactions:
            found.append(f"{sample.arm}, {sample.problem}: full KV reports {sample.compactions} compactions")
        if not sample.compactions and must_have_compacted(sample, settings):
            bound = settings.limits(sample.policy, sample.budget, sample.prompt_tokens).bound
            found.append(
                f"{sample.arm}, {sample.problem}, sample {sample.number}: no compaction, although "
                f"{sample.prompt_tokens} + {sample.completion_tokens} tokens are beyond its bound of {bound}"
            )
    for arm, members in arms.items():
        length = mean(s.prompt_tokens + s.completion_tokens for s in members)
        if arm.steering and not any(s.steered_tokens for s in members):
            found.append(
                f"{arm}: no token of any of {len(members)} answers was steered; the model must think between <think> "
                "and </think>, in thoughts with a blank line between them"
            )
        # Steered answers may end before there is anything to evict, which is what they are for.
        short = arm.steering and not any(must_have_compacted(s, settings) for s in members)
        if arm.policy != FULL and not any(s.compactions for s in members) and arm.budget < length and not short:
            found.append(
                f"{arm}: no compaction in any of {len(members)} answers, although they have {length:.0f} tokens on "
                "average; this was full KV under another name. Lower --budgets or --buffer"
            )
    return found


def describe(found: list[str]) -> str:
    """Describe the failures; only the first few in full."""
    more = f"\n  and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "this run does not count:\n  " + "\n  ".join(found[:SHOWN]) + more
