"""Generated arithmetic problems with long, sentence-structured, repetitive chains of thought.

A problem gives two sums ("givens") and a list of rules, each of which adds two values found before, modulo 10.
The chain of thought reads the givens and works off the rules. Each rule's value is stated once, where it is
found. After each rule the text doubts itself up to six times ("Wait, is that right?"); a doubt reads both
givens once more, in the same words, and confirms. The question asks for the sum of two rules' values.

So most sentences repeat an earlier one, as in real reasoning models, only more so. What must be remembered are
the sentences that are not repeated: values found once, some needed hundreds of tokens later.

    python -m benchmarks.tiny_reasoner.problems --split train --count 64 > train.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

MODULUS = 10
NUM_GIVENS = 2
NAMES = string.ascii_lowercase[:16]
FULL_RULES = (4, 4)
DOUBTS = (
    "Wait, check again.\n\n",
    "Wait, is that right?\n\n",
    "Wait, start over.\n\n",
    "Wait, try another way.\n\n",
    "Wait, hold on.\n\n",
    "Wait, once more.\n\n",
)

# First seed of each split. A split draws problem i with seed `SPLITS[split] + i`, so splits never meet; the tokenizer's
# vocabulary is taken from seeds 0 to 399.
SPLITS = {"train": 1_000_000_000, "dev": 500_000_000, "held-out": 1_000_000, "demo": 2_000_000}


@dataclass(frozen=True)
class Problem:
    """One problem: the user's text, the model's ideal answer (thoughts and all) and the answer digit."""

    question: str
    thoughts: str
    answer: int

    @property
    def completion(self) -> str:
        """The text that the model should write after `<think>\\n`."""
        return f"{self.thoughts}</think>\n\nThe answer is \\boxed{{{self.answer}}}."


def make_problem(seed: int, *, rules: tuple[int, int] = FULL_RULES, doubt: tuple[float, float] = (1.0, 1.0)) -> Problem:
    """Draw one problem.

    Args:
        seed: decides everything that the other arguments leave open.
        rules: least and most number of rules, at least 2.
        doubt: least and most probability of each doubt; drawn once a problem.
    """
    rng = random.Random(seed)
    n_rules, doubts = rng.randint(*rules), rng.uniform(*doubt)
    names = rng.sample(NAMES, NUM_GIVENS + n_rules)
    given, found = names[:NUM_GIVENS], names[NUM_GIVENS:]
    value: dict[str, int] = {}
    stated, listed, readings = [], [], []
    for name in given:
        x, y = rng.randrange(MODULUS), rng.randrange(MODULUS)
        value[name] = (x + y) % MODULUS
        stated.append(f"{name} = {x} + {y}")
        readings.append(f"Read {name} = {x} + {y}, so {name}: {value[name]}.\n\n")

    thoughts = [*readings]
    for i, name in enumerate(found):
        # One operand is a rule's value where there is one, however far back it was found.
        first = rng.choice(found[:i] or given)
        operands = [first, rng.choice([other for other in given + found[:i] if other != first])]
        rng.shuffle(operands)
        a, b = operands
        value[name] = (value[a] + value[b]) % MODULUS
        listed.append(f"{name} = {a} + {b}")
        thoughts.append(f"Find {name} = {a}: {value[a]} + {b}: {value[b]}, so {name}: {value[name]}.\n\n")
        for words in DOUBTS:
            if rng.random() >= doubts:
                break
            thoughts += [words, *readings, f"So {name} holds.\n\n"]

    a, b = rng.sample(found, 2)
    answer = (value[a] + value[b]) % MODULUS
    thoughts.append(f"Done, so {a}: {value[a]} + {b}: {value[b]} = {answer}.\n")
    question = f"Modulo 10, given {', '.join(stated)}. Rules {', '.join(listed)}. What is {a} + {b}?"
    return Problem(question, "".join(thoughts), answer)


def problems(split: str, count: int) -> Iterator[Problem]:
    """The first `count` problems of a split ("train", "dev", "held-out", "demo")."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of: {', '.join(SPLITS)}")
    return (make_problem(SPLITS[split] + i) for i in range(count))


def extract_answer(text: str) -> int | None:
    """The digit in the last `\\boxed{}` after the thoughts, or None where there is none."""
    found = re.findall(r"\\boxed\{(\d)\}", text.rpartition("</think>")[2])
    return int(found[-1]) if found else None


def main() -> None:
    """Command line: print problems as JSON lines, for `skipkv extract-vector`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--split", required=True, choices=list(SPLITS))
    parser.add_argument("--count", required=True, type=int)
    args = parser.parse_args()
    for problem in problems(args.split, args.count):
        print(json.dumps({"question": problem.question, "answer": str(problem.answer)}))


if __name__ == "__main__":
    main()
