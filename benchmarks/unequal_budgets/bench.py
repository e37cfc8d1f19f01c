"""The bundled model and its problems in the dense reference, and the arms that are compared on them."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.accuracy.grid import Budget
from benchmarks.tiny_reasoner import PAPER_PARAMETERS
from benchmarks.tiny_reasoner.problems import Problem, extract_answer, problems
from skipkv_vllm import bundled_model
from skipkv_vllm.core.limits import Limits
from skipkv_vllm.policies import Policy, make_policy
from skipkv_vllm.sentences import build_tables
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker

from .allocation import Allocation, ByHead, ByLayer, Equal
from .generation import Rows, layer_similarity


class Bench:
    """The bundled model and problems of a split.

    Args:
        args: of the command line.
        split, skip: of the problems, and how many of the first are left out.
    """

    def __init__(self, args: argparse.Namespace, split: str = "dev", skip: int = 0) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(bundled_model())
        self.model = AutoModelForCausalLM.from_pretrained(
            bundled_model(), dtype=torch.float32, attn_implementation="held"
        ).eval()
        self.problems = list(problems(split, skip + args.problems))[skip:]
        self.prompts = [self._prompt(problem) for problem in self.problems]

    def _prompt(self, problem: Problem) -> list[int]:
        chat = [{"role": "user", "content": problem.question}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    def similarity(self) -> tuple[float, ...]:
        """Take EpiCache's profile on training problems."""
        texts = [
            self._prompt(problem) + self.tokenizer(problem.completion, add_special_tokens=False).input_ids
            for problem in problems("train", self.args.train)
        ]
        return tuple(layer_similarity(self.model, torch.tensor(texts), len(self.prompts[0]), self.args.buffer))

    def rows(self) -> Rows:
        """Compute the prompts of all problems."""
        options, config = policy_of("skipkv").sentence_options, self.model.config
        tracker = SentenceTracker(
            build_tables(self.tokenizer, options.compat),
            options,
            num_rows=len(self.prompts),
            max_length=len(self.prompts[0]) + self.args.max_tokens,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        with torch.inference_mode():
            return Rows(self.model, self.prompts, self.args.window, self.args.max_tokens, tracker)

    def right(self, rows: Rows) -> list[int]:
        """Return 1 for each problem whose answer is right, else 0."""
        texts = map(self.tokenizer.decode, rows.answers)
        return [int(extract_answer(text) == problem.answer) for text, problem in zip(texts, self.problems, strict=True)]


def policy_of(name: str) -> Policy:
    """Make a base method with its parameters for this model.

    Raises:
        KVPolicyError: it is unknown.
    """
    return make_policy(name, dict(PAPER_PARAMETERS) if name == "skipkv" else None)


def run(bench: Bench) -> dict[str, Any]:
    """Run all arms; returns the contents of a summary without `run`."""
    args = bench.args
    similarity = bench.similarity()
    allocations: dict[str, Allocation] = {"equal": Equal()}
    for each in args.shares:
        name, _, exponent = each.partition(":")
        allocations[each.replace(":", " ")] = ByLayer(similarity, float(exponent)) if exponent else ByHead()
    full = bench.rows()
    whole = copy.deepcopy(full)
    whole.advance(whole.last)
    lengths = [len(answer) for answer in whole.answers]
    mean_length = sum(lengths) / len(lengths)
    budgets = {text: Budget(text).tokens(mean_length) for text in args.budgets}
    arms, start = [], time.monotonic()
    for text, budget in sorted(budgets.items(), key=lambda item: item[1]):
        limits = Limits(budget, args.buffer, args.window, full.num_prompt)
        # Up to the first compaction all arms of a budget, and those of larger ones, are the same.
        full.advance(limits.bound)
        for base in args.bases:
            for name, allocation in allocations.items():
                rows, policy = copy.deepcopy(full), policy_of(base)
                while not rows.is_done:
                    rows.compact(policy, allocation, limits.keep, args.buffer)
                    rows.advance(rows.num_logical + args.buffer)
                right = bench.right(rows)
                arms.append({"base": base, "budget": text, "tokens": limits.keep, "shares": name, "correct": right})
                seconds = time.monotonic() - start
                print(f"{seconds:6.0f} s  {base} at {text}, {name}: {sum(right) / len(right):.1%}", file=sys.stderr)
    return {
        "full": {"accuracy": sum(bench.right(whole)) / len(lengths), "mean_length": mean_length},
        "profile": [
            {"layer": i, "similarity": similarity[i]}
            | {name: each.weights()[i] for name, each in allocations.items() if isinstance(each, ByLayer)}
            for i in range(len(similarity))
        ],
        "arms": arms,
    }
