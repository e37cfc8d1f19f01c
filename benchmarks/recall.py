"""Recall: facts that are stated once in a long text, and asked for at its end.

    python -m benchmarks.recall                                   # SmolLM2, 1,000 tokens, 48 questions
    python -m benchmarks.recall --lengths 1000 2500 --questions 96 --methods skipkv snapkv

`make real-models MODELS=smollm2` fetches the model. Prompts are not protected, so they are compacted like generated
text. docs/guides/evaluation.md says what is measured. Results are kept in --out as soon as they are there; the same
command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real_models import FOLDER
from benchmarks.texts import KINDS
from skipkv_vllm.config import parse_json_object
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.evaluation.arms import WHOLE, Arm, Arms, Request, Serve, budgets_of, check_each_once, check_methods
from skipkv_vllm.evaluation.command import METHODS, check_at_least, check_configs, guarded, load_tokenizer
from skipkv_vllm.evaluation.engine import Done, Setup, serve
from skipkv_vllm.evaluation.machine import provenance, relative
from skipkv_vllm.evaluation.report import terminal_table
from skipkv_vllm.evaluation.stats import paired_difference, wilson
from skipkv_vllm.evaluation.texts import Source, Text, leading_tokens, take_in_turn

NAMES = ("Anna", "Peter", "Maria", "Thomas", "Julia", "Martin", "Laura", "Simon", "Clara", "David", "Emma", "Paul")
ANSWER_TOKENS = 32
ENOUGH = 0.65
"""Share of right answers of full KV below which a length says nothing about eviction."""
FACT = "\nRemember this: the secret code of {name} is {code}.\n"
QUESTION = "What is the secret code of {name}?"
ANSWER = "The secret code of {name} is"


@dataclass(frozen=True)
class Question:
    """A question about a fact in a context.

    Attributes:
        name: unique within a run.
        code: the right answer, four digits.
        prompt: token ids of context and question, up to where the answer begins.
        answer: token ids of the right answer up to the code.
        value: token ids of the code.
    """

    name: str
    code: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    value: tuple[int, ...]

    @property
    def requests(self) -> tuple[Request, Request]:
        """To answer freely, and to score the right answer."""
        title = f"question {self.name}"
        return (
            Request(f"{self.name}-answer", title, self.prompt, num_new=ANSWER_TOKENS),
            Request(f"{self.name}-score", title, (*self.prompt, *self.answer, *self.value), top=0),
        )


def ask(text: Text, tokenizer: Any, facts: int) -> list[Question]:
    """Hide facts in a text and ask for each.

    Args:
        text: the context; as many of its tokens are left out as the facts take.
        tokenizer: with a chat template the text is a user's message, else the question is appended in plain words.
        facts: in the text.

    Returns:
        A question for each fact, all with the same context.
    """
    draw = random.Random(text.digest)
    encode = _encoder(tokenizer)
    codes = {name: str(draw.randint(1000, 9999)) for name in draw.sample(NAMES, facts)}
    before, after, lead = _chat(tokenizer)
    told = [encode(FACT.format(name=name, code=code)) for name, code in codes.items()]
    start = encode(before) or leading_tokens(tokenizer)
    body = list(text.tokens[len(leading_tokens(tokenizer)) :])
    body = body[: len(text.tokens) - len(start) - sum(map(len, told))]
    # Each fact has an equal part of the text's first four fifths to itself.
    width = 0.8 * len(body) / facts
    for number in reversed(range(facts)):
        at = round(width * (number + draw.random()))
        body[at:at] = told[number]
    questions = []
    for name, code in codes.items():
        prompt = (*start, *body, *encode("\n\n" + QUESTION.format(name=name) + after))
        answer, value = encode(lead + ANSWER.format(name=name)), encode(f" {code}")
        digest = hashlib.sha256(repr((prompt, answer, value)).encode()).hexdigest()[:16]
        questions.append(Question(digest, code, prompt, tuple(answer), tuple(value)))
    return questions


def _encoder(tokenizer: Any) -> Any:
    return lambda text: list(tokenizer(text, add_special_tokens=False).input_ids)


def _chat(tokenizer: Any) -> tuple[str, str, str]:
    """What a model's chat has before and after a user's message, and what an answer begins with."""
    if not tokenizer.chat_template:
        return "", "\nAnswer:", " "
    mark = "@@@"
    chat = [{"role": "user", "content": mark}]
    before, _, after = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).partition(mark)
    return before, after, ""


def is_right(code: str, answer: str) -> bool:
    """Whether the code is in the answer, as a number of its own."""
    return re.search(rf"(?<!\d){code}(?!\d)", answer) is not None


class Recall:
    """A run and its folder.

    Args:
        setup: what the engines have in common.
        methods: to measure; full KV always is.
        ratios: lengths over budgets.
        questions: length -> its questions.
        tokenizer: turns answers into text.
        out: folder; results in it are used.
        serve: starts engines.
    """

    def __init__(
        self,
        setup: Setup,
        methods: Sequence[str],
        ratios: Sequence[float],
        questions: dict[int, list[Question]],
        tokenizer: Any,
        out: Path,
        serve: Serve = serve,
    ) -> None:
        self.questions, self.tokenizer = questions, tokenizer
        self.arms = {
            length: [Arm(method, budget) for budget in budgets_of(ratios, length) for method in methods]
            for length in questions
        }
        for length in questions:
            check_methods(setup, methods, budgets_of(ratios, length))
        self._codes = {each.name: each for group in questions.values() for each in group}
        self._arms = Arms(setup, out, serve, {"answer_tokens": ANSWER_TOKENS}, [Path(__file__)])

    def __call__(self) -> list[dict[str, Any]]:
        """Run what is missing and sum up: a row per length, method and budget, full KV first.

        Raises:
            RunError: an engine failed, or a method made no compaction where the length demanded one.
        """
        wanted: dict[Arm, list[Request]] = {}
        for length, questions in self.questions.items():
            requests = [request for question in questions for request in question.requests]
            for arm in (WHOLE, *self.arms[length]):
                wanted.setdefault(arm, []).extend(requests)
        self._arms.run(wanted, self._keep, "request")
        return [row for length in self.questions for row in self._rows(length)]

    def _keep(self, arm: Arm, request: Request, done: Done) -> dict[str, Any]:
        question = self._codes[request.name.partition("-")[0]]
        kept: dict[str, Any] = {"compactions": done.compactions}
        if done.scores is None:
            text = self.tokenizer.decode(done.new_tokens, skip_special_tokens=True)
            return kept | {"right": is_right(question.code, text), "text": text}
        return kept | {"logprob": done.scores.logprobs[-len(question.value) :, 0].mean()}

    def _rows(self, length: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        whole: list[float] = []
        for arm in (WHOLE, *self.arms[length]):
            answers, scores = [], []
            for question in self.questions[length]:
                answer, score = (self._arms.load(arm, request) for request in question.requests)
                answers.append(answer)
                scores.append(float(score["logprob"]))
            whole = whole or scores
            right, total = sum(bool(each["right"]) for each in answers), len(answers)
            rows.append(
                {
                    "length": length,
                    "method": arm.method,
                    "budget": arm.budget,
                    "right": right,
                    "questions": total,
                    "interval": list(wilson(right, total)),
                    "logprob": float(np.mean(scores)),
                    "logprob_to_full": list(paired_difference(scores, whole)),
                    "compactions": float(np.mean([each["compactions"] for each in answers])),
                    "counts": rows[0]["counts"] if rows else right >= ENOUGH * total,
                }
            )
        return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    head = ("length", "method", "budget", "right", "95 % interval", "log probability", "to full KV", "compactions")
    cells = []
    for row in rows:
        low, high = row["interval"]
        difference, least, most = row["logprob_to_full"]
        is_full = row["method"] == WHOLE.method
        cells.append(
            (
                str(row["length"]),
                "full KV" if is_full else row["method"],
                "" if is_full else str(row["budget"]),
                f"{row['right']} of {row['questions']}",
                f"{low:.0%} to {high:.0%}",
                f"{row['logprob']:.3f}",
                "" if is_full else f"{difference:+.3f} [{least:+.3f}, {most:+.3f}]",
                f"{row['compactions']:.1f}",
            )
        )
    lines = [terminal_table(head, cells, left=2)]
    for row in rows:
        if row["method"] == WHOLE.method and not row["counts"]:
            lines.append(
                f"length {row['length']} does not count: full KV is right in {row['right']} of {row['questions']}, "
                f"below {ENOUGH:.0%}; the model is too weak for it. Choose shorter --lengths or fewer --facts"
            )
    return "\n".join(lines)


def make_questions(kinds: Sequence[str], tokenizer: Any, length: int, count: int, facts: int) -> list[Question]:
    """At least `count` questions about contexts of a length.

    Raises:
        KVPolicyError: there is not enough text.
    """
    contexts = -(-count // facts)
    sources = [Source(kind, KINDS[kind]()) for kind in kinds]
    texts = take_in_turn(sources, tokenizer, length, contexts)
    if len(texts) < contexts:
        raise KVPolicyError(
            f"--questions {count}: there is text for {len(texts) * facts} questions at length {length}; ask fewer, or "
            f"add --kinds of: {', '.join(KINDS)}"
        )
    return [question for text in texts for question in ask(text, tokenizer, facts)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=relative(str(FOLDER / "smollm2")), help="folder of a checkpoint, or name")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1000], metavar="N", help="tokens before a question")
    parser.add_argument("--questions", type=int, default=48, metavar="N", help="for each length, at least")
    parser.add_argument("--facts", type=int, default=2, metavar="N", help="in a context; each is asked for")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of text around the facts")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--ratio", nargs="+", type=float, default=[2, 4, 8], metavar="R", help="budgets: length / R")
    parser.add_argument("--buffer", type=int, default=128, metavar="N", help="kv_buffer")
    parser.add_argument("--window", type=int, default=8, metavar="N", help="kv_window")
    parser.add_argument("--granularity", choices=["head", "sentence"], default="head", help="kv_granularity")
    parser.add_argument("--policy-config", default="{}", metavar="JSON", help="parameters by method")
    parser.add_argument("--num-seqs", type=int, default=8, metavar="N", help="requests at once")
    parser.add_argument("--engine", default="{}", metavar="JSON", help="further arguments of vllm.LLM")
    parser.add_argument(
        "--out", type=Path, default=Path("build/recall"), metavar="FOLDER", help="where results are kept"
    )
    return parser


def run(args: argparse.Namespace, serve: Serve = serve) -> dict[str, Any]:
    """Measure, print the table and write `recall.json` into --out; returns what it holds."""
    for flag, value, low in (("--questions", args.questions, 1), ("--num-seqs", args.num_seqs, 1)):
        check_at_least(flag, value, low)
    if not 1 <= args.facts <= len(NAMES):
        raise KVPolicyError(f"--facts {args.facts} is out of range; allowed: 1 to {len(NAMES)}")
    check_each_once("--lengths", args.lengths)
    for length in args.lengths:
        check_at_least("--lengths", length, 100 * args.facts)
    methods, configs = check_configs(args.methods, args.policy_config)
    tokenizer = load_tokenizer(args.model)
    questions = {
        length: make_questions(args.kinds, tokenizer, length, args.questions, args.facts) for length in args.lengths
    }
    longest = max(len(request.tokens) for each in questions.values() for one in each for request in one.requests)
    setup = Setup(
        relative(args.model),
        longest + ANSWER_TOKENS,
        args.buffer,
        args.window,
        args.granularity,
        configs,
        args.num_seqs,
        parse_json_object("--engine", args.engine),
    )
    rows = Recall(setup, methods, args.ratio, questions, tokenizer, args.out, serve)()
    settings = {name: value for name, value in vars(args).items() if name != "out"} | {"policy_config": configs}
    report = {"run": provenance("benchmarks.recall", settings), "rows": rows}
    print(describe(rows))
    path = args.out / "recall.json"
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.write_text(f'{{\n "run": {json.dumps(report["run"])},\n "rows": [\n  {lines}\n ]\n}}\n')
    print(f"wrote {path}")
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    return guarded(parser.prog, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
