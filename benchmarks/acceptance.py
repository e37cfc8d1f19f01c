"""Share of n-gram drafts that a model accepts with eviction and with full KV, on texts that repeat themselves.

    python -m benchmarks.acceptance                                      # the bundled model
    python -m benchmarks.acceptance --model build/real-models/smollm2 --kind reasoning

The first half of a text is the prompt, which is not protected, and the budget is half the text. With greedy decoding
the text alone decides which drafts are accepted, and eviction changes the text. So the same drafts are also judged on
texts that are given: the one that the prompt was cut from, and the answer of full KV. Scheduling is synchronous, as
vLLM's search for n-grams on the host cannot do otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.load.drafts import DRAFT_ROOM, NGRAM, DraftCounter, Drafts
from benchmarks.remote import Remote, answer_orders
from benchmarks.results.pages import publish
from benchmarks.results.provenance import record
from benchmarks.results.sections.speculation import acceptance_table, finding
from benchmarks.texts import repetitive
from benchmarks.tiny_reasoner.problems import problems
from benchmarks.tiny_reasoner.train import encode
from skipkv_vllm import KVPolicyError, bundled_model
from skipkv_vllm.evaluation.children import attended
from skipkv_vllm.evaluation.command import check_at_least, guarded, load_tokenizer
from skipkv_vllm.evaluation.engine import Job, Setup, serve
from skipkv_vllm.evaluation.figures import FULL
from skipkv_vllm.evaluation.machine import relative
from skipkv_vllm.evaluation.stats import Z95, Difference
from skipkv_vllm.evaluation.texts import leading_tokens

Tokens = Sequence[int]
Propose = Callable[[Tokens], Tokens]
"""Returns the drafts that follow a text."""
CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer here has, so that a text is long enough."""


class Order(NamedTuple):
    """Prompts for an engine to continue.

    Attributes:
        prompts: token ids.
        num_new: tokens to generate for each.
        options: of the policy, the same for all.
    """

    prompts: Sequence[Tokens]
    num_new: int
    options: Mapping[str, Any]


class Answer(NamedTuple):
    """An answer: its tokens, the drafts that were verified for it, and the number of compactions."""

    tokens: list[int]
    drafts: Drafts
    compactions: int


# ---- an engine with drafts


class Engine:
    """An engine in this process."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        from skipkv_vllm import LLM

        self._engine = LLM(**arguments).llm_engine
        self._counter = DraftCounter(self._engine.engine_core.engine_core.scheduler)

    def answer(self, order: Order) -> list[Answer]:
        """Continue all prompts; the answers are in their order."""
        import torch

        from skipkv_vllm.integration.llm import sampling_params

        self._counter.by_request.clear()
        known_as: dict[str, str] = {}
        done: dict[str, Any] = {}
        for number, prompt in enumerate(order.prompts):
            params = sampling_params(
                order.options, max_tokens=order.num_new, temperature=0.0, ignore_eos=True, detokenize=False
            )
            known_as[str(number)] = self._engine.add_request(str(number), {"prompt_token_ids": list(prompt)}, params)
        # vLLM compiles helpers of sampling even if the model runs eagerly.
        with torch.compiler.set_stance("force_eager"):
            while self._engine.has_unfinished_requests():
                done |= {output.request_id: output for output in self._engine.step() if output.finished}
        answers = []
        for name, known in known_as.items():
            report = (done[name].kv_transfer_params or {}).get("skipkv", {})
            tokens = list(done[name].outputs[0].token_ids)
            answers.append(Answer(tokens, self._counter.by_request[known], report.get("compactions", 0)))
        return answers


def work(connection: Connection, arguments: Mapping[str, Any], log: Path) -> None:
    """Body of the engine's process: answers each `Order`; see `benchmarks.remote`."""
    with attended(connection, log):
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        answer_orders(connection, Engine(arguments).answer)


# ---- drafts of given texts


def propose_ngram(text: Tokens) -> Tokens:
    """Return vLLM's drafts for a text."""
    from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find

    drafts = find(
        origin_tokens=np.asarray(text, np.int32),
        min_ngram=NGRAM["prompt_lookup_min"],
        max_ngram=NGRAM["prompt_lookup_max"],
        max_model_len=len(text) + NGRAM["num_speculative_tokens"],
        k=NGRAM["num_speculative_tokens"],
    )
    return [int(token) for token in drafts]


def replay(text: Tokens, start: int, propose: Propose) -> Drafts:
    """Count the drafts of an engine that generates a text from its token `start` + 1 on.

    The token at `start` comes from the prompt, without drafts. The last draft leaves room for a token of the model.
    """
    place, drafts = start + 1, Drafts()
    while place < len(text):
        proposed = propose(text[:place])[: len(text) - place - 1]
        accepted = _common(proposed, text[place:])
        drafts += Drafts(len(proposed), accepted)
        place += accepted + 1
    return drafts


def judge(text: Tokens, start: int, chosen: Tokens, propose: Propose) -> Drafts:
    """Count the drafts that a model accepts if each place of a text from `start` on is drafted once.

    Args:
        text: given.
        start: first place.
        chosen: as long as the text; the token that the model chooses at a place, given the text before it.
        propose: see `Propose`.

    Drafts after an accepted one that is not in the text are left out: what the model chooses there is not known.
    """
    drafts = Drafts()
    for place in range(start, len(text)):
        proposed = propose(text[:place])[: len(text) - place]
        accepted = _common(proposed, chosen[place:])
        same = _common(proposed, text[place:])
        if accepted > same:
            drafts += Drafts(same + 1, same + 1)
        else:
            drafts += Drafts(len(proposed), accepted)
    return drafts


def _common(first: Tokens, second: Tokens) -> int:
    """Return the number of tokens with which both begin."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))


def difference(ours: Sequence[Drafts], theirs: Sequence[Drafts]) -> Difference:
    """Return the difference of two shares of accepted drafts, paired by text.

    The interval is of the difference of two ratio estimators (Cochran, Sampling Techniques, 1977, section 6.4), with
    the texts as the sample.

    Args:
        ours, theirs: drafts of each text, in the same order; at least one text.
    """
    parts = []
    for arm in (ours, theirs):
        counts = np.array(arm, float)
        verified, accepted = counts.sum(axis=0)
        parts.append((accepted / verified, (counts[:, 1] - accepted / verified * counts[:, 0]) / verified))
    (our_share, our_errors), (their_share, their_errors) = parts
    number = len(ours)
    spread = np.sqrt(number / max(1, number - 1) * np.square(our_errors - their_errors).sum())
    value = float(our_share - their_share)
    return Difference(value, value - Z95 * float(spread), value + Z95 * float(spread))


# ---- the command


def run(args: argparse.Namespace, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table and write the figures; returns them.

    Raises:
        KVPolicyError: bad input, or a budget at which nothing was evicted.
        RunError: an engine failed.
    """
    for flag, value, low in (("--texts", args.texts, 2), ("--length", args.length, 64)):
        check_at_least(flag, value, low)
    budget, start = args.length // 2, args.length // 2
    setup = Setup(
        relative(args.model), args.length + DRAFT_ROOM, args.buffer, granularity=args.granularity,
        num_seqs=args.num_seqs, arguments={"dtype": "float32"},
    )  # fmt: skip
    setup.check([args.policy], [budget], "--length: budget")
    texts = make_texts(args.kind, load_tokenizer(args.model), args.texts, args.length)
    options = [{"kv_policy": FULL}, {"kv_policy": args.policy, "kv_budget": budget}]
    with tempfile.TemporaryDirectory(prefix="skipkv-acceptance-") as folder:
        logs = args.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        full, evicted = _generate(setup, args, [text[:start] for text in texts], options, logs)
        compactions = float(np.mean([answer.compactions for answer in evicted]))
        if not compactions:
            raise KVPolicyError(
                f"--length {args.length}: nothing was evicted; choose a longer one or a smaller --buffer"
            )
        answers = [[*text[:start], *answer.tokens] for text, answer in zip(texts, full, strict=True)]
        by_full, by_policy = _choose(setup, args.policy, budget, [*texts, *answers], logs / "given.log")
    own = [[*text[:start], *answer.tokens] for text, answer in zip(texts, evicted, strict=True)]

    def judged(given: Sequence[Tokens], chosen: Sequence[Tokens]) -> list[Drafts]:
        return [judge(text, start, each, propose_ngram) for text, each in zip(given, chosen, strict=True)]

    number = len(texts)
    pairs = {
        "own": [[each.drafts for each in arm] for arm in (full, evicted)],
        "replayed": [[replay(text, start, propose_ngram) for text in arm] for arm in (answers, own)],
        "full": [judged(answers, chosen[number:]) for chosen in (by_full, by_policy)],
        "source": [judged(texts, chosen[:number]) for chosen in (by_full, by_policy)],
    }
    rows = [
        {"text": kind, "difference": difference(ours, theirs), "drafts": [sum(arm, Drafts()) for arm in (theirs, ours)]}
        for kind, (theirs, ours) in pairs.items()
    ]
    figures = {
        "run": record("benchmarks.acceptance", vars(args) | {"model": relative(args.model)}, arguments, note=args.note),
        "budget": budget,
        "compactions": compactions,
        "speculation": NGRAM,
        "rows": rows,
    }
    print(f"\n{acceptance_table(rows)}\n\n{finding(rows)} {compactions:.1f} compactions a text.\n")
    if args.out:
        publish(figures, args.out)
    return figures


def make_texts(kind: str, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Return the beginnings of texts that repeat themselves, of `length` tokens each.

    Args:
        kind: "reasoning" for that of `benchmarks.texts`, "problems" for those that the bundled model was trained on.
        tokenizer: of the model.
        count: of texts.
        length: of a text.

    Raises:
        KVPolicyError: texts of the kind are shorter.
    """
    if kind == "problems":
        texts = [encode(problem, tokenizer)[0] for problem in problems("held-out", count)]
    else:
        start = leading_tokens(tokenizer)
        documents = [repetitive(seed, CHARACTERS_PER_TOKEN * length) for seed in range(count)]
        texts = [[*start, *tokenizer(text, add_special_tokens=False).input_ids] for text in documents]
    if (shortest := min(map(len, texts))) < length:
        raise KVPolicyError(f"--length {length}: a text of --kind {kind} has {shortest} tokens; choose fewer")
    return [text[:length] for text in texts]


def _generate(
    setup: Setup, args: argparse.Namespace, prompts: Sequence[Tokens], options: Sequence[Mapping[str, Any]], logs: Path
) -> list[list[Answer]]:
    """Return the answers with each of the options, from one engine with drafts."""
    drafts = {"speculative_config": NGRAM, "async_scheduling": False}
    engine = Remote(work, ({"model": setup.model} | setup.engine_arguments([args.policy]) | drafts,), logs / "own.log")
    try:
        return [engine.ask(Order(prompts, args.length - len(prompts[0]), each)) for each in options]
    finally:
        engine.stop()


def _choose(setup: Setup, policy: str, budget: int, texts: Sequence[Tokens], log: Path) -> list[list[Tokens]]:
    """Return, with full KV and with the policy, the tokens that the model chooses at each place of given texts."""
    jobs = [
        Job(f"{method}-{number}", method, budget, text, top=1)
        for method in (FULL, policy)
        for number, text in enumerate(texts)
    ]
    chosen: dict[str, Tokens] = {}
    with serve(setup, [policy], log) as answer:
        for done in answer(jobs):
            assert done.scores is not None
            # Nothing predicts the first token.
            chosen[done.key] = [-1, *done.scores.tokens[:, 1].tolist()]
    return [[chosen[f"{method}-{number}"] for number in range(len(texts))] for method in (FULL, policy)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=bundled_model(), help="folder of a checkpoint, or name")
    parser.add_argument(
        "--kind", choices=["problems", "reasoning"], default="problems",
        help="of texts; other models than the bundled one do not know the problems",
    )  # fmt: skip
    parser.add_argument("--texts", type=int, default=96, metavar="N")
    parser.add_argument("--length", type=int, default=768, metavar="N", help="tokens of prompt and answer, half each")
    parser.add_argument("--policy", default="skipkv")
    parser.add_argument("--buffer", type=int, default=64, metavar="N", help="kv_buffer")
    parser.add_argument("--granularity", choices=["head", "sentence"], default="sentence", help="kv_granularity")
    parser.add_argument("--num-seqs", type=int, default=8, metavar="N", help="requests at once")
    parser.add_argument("--note", default="", help="something that readers of the results should know")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs in this folder")
    parser.add_argument("--out", type=Path, help="write the figures as JSON, e.g. docs/results/acceptance.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    return guarded(parser.prog, lambda: run(args, arguments) and None, stopped="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
