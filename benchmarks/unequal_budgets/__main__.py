"""Accuracy of the bundled model with equal and unequal budgets at equal total memory, in a dense reference.

    python -m benchmarks.unequal_budgets

`adakv` gives each kv head of a layer as many tokens as it has among the layer's best, `epicache` gives each layer its
share by a profile taken on training problems. One block table can hold neither; this is what it would be worth.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.accuracy.docs import write_summary
from benchmarks.accuracy.grid import Budget
from benchmarks.tiny_reasoner import PAPER_PARAMETERS
from benchmarks.tiny_reasoner.problems import Problem, extract_answer, problems
from skipkv_vllm import bundled_model
from skipkv_vllm.core.limits import Limits
from skipkv_vllm.evaluation.machine import provenance
from skipkv_vllm.policies import Policy, make_policy, policy_names
from skipkv_vllm.sentences import build_tables
from skipkv_vllm.worker.signals.sentence_tracker import SentenceTracker

from .allocation import Allocation, ByHead, ByLayer, Equal
from .generation import NOT_HERE, Rows, layer_similarity
from .section import UNEQUAL, unequal_table

BASES = ("snapkv", "rkv", "skipkv")
BUDGETS = ("10%", "25%", "40%", "60%")
SHARES = ("adakv", "epicache:0.5", "epicache:1.1", "epicache:2")  # 1.1 is EpiCache's for Llama


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
        """EpiCache's profile, on training problems."""
        texts = [
            self._prompt(problem) + self.tokenizer(problem.completion, add_special_tokens=False).input_ids
            for problem in problems("train", self.args.train)
        ]
        return tuple(layer_similarity(self.model, torch.tensor(texts), len(self.prompts[0]), self.args.buffer))

    def rows(self) -> Rows:
        """All problems, with their prompts computed."""
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
        """1 for each problem whose answer is right, else 0."""
        texts = map(self.tokenizer.decode, rows.answers)
        return [int(extract_answer(text) == problem.answer) for text, problem in zip(texts, self.problems, strict=True)]


def policy_of(name: str) -> Policy:
    """A base with its parameters for this model.

    Raises:
        KVPolicyError: it is unknown.
    """
    return make_policy(name, dict(PAPER_PARAMETERS) if name == "skipkv" else None)


def run(bench: Bench) -> dict[str, Any]:
    """All arms; what a file of figures holds but for its provenance."""
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


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100, help="of the dev split")
    parser.add_argument("--skip", type=int, default=0, help="first problems of the split that are left out")
    parser.add_argument("--train", type=int, default=16, help="training problems of the profile")
    parser.add_argument("--bases", nargs="+", default=list(BASES), metavar="POLICY")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), metavar="B", help="tokens, or shares of full KV")
    parser.add_argument(
        "--shares", nargs="+", default=list(SHARES), metavar="SHARES", help="adakv, or epicache:EXPONENT"
    )
    parser.add_argument("--buffer", type=int, default=128)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path("docs") / UNEQUAL)
    args = parser.parse_args()
    for name, least in {"problems": 1, "skip": 0, "train": 1, "buffer": 1, "window": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)} is out of range; allowed: at least {least}")
    for each in args.shares:
        if not re.fullmatch(r"adakv|epicache:\d+(\.\d+)?", each):
            parser.error(f"--shares {each!r} is neither adakv nor epicache:EXPONENT, e.g. epicache:1.1")
    scored = [name for name in policy_names() if name != "full" and not policy_of(name).needs & NOT_HERE]
    if unknown := [name for name in args.bases if name not in scored]:
        parser.error(f"--bases {' '.join(unknown)} cannot be used here; choose some of: {', '.join(scored)}")
    figures = run(Bench(args, skip=args.skip))
    settings = vars(args) | {"out": str(args.out)}
    summary = {"run": provenance("benchmarks.unequal_budgets", settings)} | figures
    write_summary(summary, args.out)
    print(unequal_table(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
