"""Generated arithmetic problems with long, sentence-structured, repetitive chains of thought.

A problem gives some one-letter values and rules that add two earlier values (modulo 10). The chain of
thought works the rules off one by one. After a step the value alone decides what follows: an even value
is checked again ("Wait, ..."), a value of seven or more is also derived the other way round
("Alternatively, ..."). So verification is long and repetitive, as in real reasoning models, but
predictable from the text, and it ends.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass

MODULUS = 10

# First seed of each split. A split draws problem i with seed `SPLITS[split] + i`, so splits never meet.
SPLITS = {"train": 1_000_000_000, "dev": 500_000_000, "held-out": 1_000_000, "demo": 2_000_000}


@dataclass(frozen=True)
class Problem:
    """One problem: the user's text, the model's ideal answer (thoughts and all) and the answer digit."""

    question: str
    thoughts: str
    answer: int

    @property
    def completion(self) -> str:
        """What the model should write after `<think>\\n`."""
        return f"{self.thoughts}</think>\n\nThe answer is \\boxed{{{self.answer}}}."


def make_problem(seed: int, *, steps: int | None = None, givens: int | None = None) -> Problem:
    """Draw one problem.

    Args:
        seed: decides everything that the other arguments leave open.
        steps: number of rules (1-20); drawn from 12-20 when omitted, which makes traces of 500-900 tokens.
        givens: number of given values (2-6); drawn from 3-6 when omitted.
    """
    rng = random.Random(seed)
    n_givens = givens if givens is not None else rng.randint(3, 6)
    n_steps = steps if steps is not None else rng.randint(12, 20)
    names = rng.sample(string.ascii_lowercase, n_givens + n_steps)
    value = {name: rng.randrange(MODULUS) for name in names[:n_givens]}
    stated = ", ".join(f"{name}: {value[name]}" for name in names[:n_givens])

    rules, thoughts = [], []
    for i, name in enumerate(names[n_givens:], start=1):
        a, b = rng.sample(names[: n_givens + i - 1], 2)
        total = value[a] + value[b]
        value[name] = total % MODULUS
        rules.append(f"Rule {i}: {name} = {a} + {b}.\n")
        work = f"{name} = {a} + {b}, where {a}: {value[a]} + {b}: {value[b]} = {total}, so {name}: {value[name]}.\n\n"
        thoughts.append(f"Step {i}: {work}")
        if value[name] % 2 == 0:
            thoughts.append(f"Wait, let me check that again: {work}")
        if value[name] >= 7:
            thoughts.append(f"Alternatively, {b}: {value[b]} and {a}: {value[a]} also give {name}: {value[name]}.\n\n")
    asked = rng.choice(names[n_givens:])
    thoughts.append(f"All rules are done, so {asked}: {value[asked]}.\n")
    question = f"All sums are modulo 10. Given {stated}.\n{''.join(rules)}What is {asked}?"
    return Problem(question, "".join(thoughts), value[asked])


def make_recall(seed: int, bindings: int) -> Problem:
    """Draw a pure look-up exercise, the first level of the training curriculum."""
    rng = random.Random(seed)
    names = rng.sample(string.ascii_lowercase, bindings)
    value = {name: rng.randrange(MODULUS) for name in names}
    stated = ", ".join(f"{name}: {value[name]}" for name in names)
    queries = [rng.choice(names) for _ in range(12)]
    recalled = "".join(f"Recall {name}: {value[name]}.\n\n" for name in queries)
    return Problem(f"Given {stated}.\nRecall.", recalled, value[queries[-1]])


def problems(split: str, count: int) -> Iterator[Problem]:
    """The first `count` problems of a split ("train", "dev", "held-out", "demo")."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of: {', '.join(SPLITS)}")
    return (make_problem(SPLITS[split] + i) for i in range(count))


def extract_answer(text: str) -> int | None:
    """The digit in the last `\\boxed{}` after the thoughts, or None where there is none."""
    found = re.findall(r"\\boxed\{(\d)\}", text.rpartition("</think>")[2])
    return int(found[-1]) if found else None
