"""Texts that every machine with this repository has, or can make: prose, code, mathematics, and repetitive reasoning.

python -m benchmarks.texts mathematics 0      # print one of them
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import gcd
from pathlib import Path

from skipkv_vllm.evaluation.texts import Source

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = ("argparse", "heapq", "textwrap", "statistics", "shlex", "fractions", "ast", "tarfile", "csv", "bisect")
GENERATED = 12
"""Documents of each generated kind."""
CHARACTERS = 18_000
"""Of a generated document, at least."""


def default_sources() -> list[Source]:
    """One source of each kind; their documents are read or made when they are needed."""
    return [Source(kind, make()) for kind, make in KINDS.items()]


def prose() -> Iterator[str]:
    """The project's own documentation without the pages of results."""
    docs = REPOSITORY / "docs"
    pages = [path for path in sorted(docs.rglob("*.md")) if not path.is_relative_to(docs / "results")]
    for path in (*pages, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"):
        yield path.read_text()


def code() -> Iterator[str]:
    """Modules of Python's standard library."""
    for name in MODULES:
        yield Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text()


def mathematics() -> Iterator[str]:
    """Worked solutions of drawn problems."""
    for seed in range(GENERATED):
        yield solutions(seed)


def reasoning() -> Iterator[str]:
    """Reasoning that repeats itself."""
    for seed in range(GENERATED):
        yield repetitive(seed)


KINDS: dict[str, Callable[[], Iterator[str]]] = {
    "prose": prose,
    "code": code,
    "mathematics": mathematics,
    "repetitive": reasoning,
}


# ---- mathematics


def solutions(seed: int, characters: int = CHARACTERS) -> str:
    """Problems with worked solutions.

    Args:
        seed: of the drawing.
        characters: length at least.
    """
    draw = random.Random(f"mathematics {seed}")
    parts: list[str] = []
    while sum(map(len, parts)) < characters:
        problem, steps = draw.choice(PROBLEMS)(draw)
        parts.append(f"Problem {len(parts) + 1}. {problem}\n\nSolution. {' '.join(steps)}\n\n")
    return "".join(parts)


Worked = tuple[str, list[str]]


def _linear(draw: random.Random) -> Worked:
    a, b, x = draw.randint(2, 12), draw.randint(1, 40), draw.randint(-15, 15)
    c = a * x + b
    return f"Solve {a}x + {b} = {c}.", [
        f"Subtract {b} from both sides to get {a}x = {c - b}.",
        f"Dividing by {a} gives x = {x}.",
        f"To check, {a} * ({x}) + {b} = {a * x} + {b} = {c}, as required.",
    ]


def _quadratic(draw: random.Random) -> Worked:
    p, q = draw.randint(1, 12), draw.randint(1, 12)
    return f"Find the roots of x^2 - {p + q}x + {p * q} = 0.", [
        f"We look for two numbers whose sum is {p + q} and whose product is {p * q}.",
        f"These are {p} and {q}, because {p} + {q} = {p + q} and {p} * {q} = {p * q}.",
        f"Therefore the left side factors as (x - {p})(x - {q}), and the roots are x = {p} and x = {q}.",
    ]


def _series(draw: random.Random) -> Worked:
    first, step, count = draw.randint(1, 20), draw.randint(2, 9), draw.randint(8, 40)
    last = first + (count - 1) * step
    terms = f"{first}, {first + step}, {first + 2 * step}, ..."
    return f"What is the sum of the first {count} terms of the sequence {terms}?", [
        f"The terms grow by {step}, so this is an arithmetic sequence.",
        f"Its last term is {first} + {count - 1} * {step} = {last}.",
        f"The sum is the number of terms times the mean of the first and the last term, {count} * ({first} + {last}) "
        f"/ 2 = {count * (first + last) // 2}.",
    ]


def _divisor(draw: random.Random) -> Worked:
    a, b = sorted((draw.randint(60, 900), draw.randint(60, 900)), reverse=True)
    steps, x, y = ["We use Euclid's algorithm."], a, b
    while y:
        steps.append(f"Dividing {x} by {y} leaves the remainder {x % y}.")
        x, y = y, x % y
    return f"Find the greatest common divisor of {a} and {b}.", [
        *steps,
        f"The last remainder that is not zero is {gcd(a, b)}, so this is the greatest common divisor.",
    ]


def _fractions(draw: random.Random) -> Worked:
    a, b = (Fraction(draw.randint(1, 11), draw.randint(2, 12)) for _ in range(2))
    common = a.denominator * b.denominator // gcd(a.denominator, b.denominator)
    own = [each.numerator * common // each.denominator for each in (a, b)]
    return f"Write {a} + {b} as a single fraction.", [
        f"The least common denominator is {common}.",
        f"Over it the fractions are {own[0]}/{common} and {own[1]}/{common}.",
        f"Their sum is {sum(own)}/{common}, which in lowest terms is {a + b}.",
    ]


def _derivative(draw: random.Random) -> Worked:
    a, b, c, x = (draw.randint(2, 9) for _ in range(4))
    value = 3 * a * x**2 + 2 * b * x + c
    return f"Let f(x) = {a}x^3 + {b}x^2 + {c}x. Find the slope of f at x = {x}.", [
        f"By the power rule f'(x) = {3 * a}x^2 + {2 * b}x + {c}.",
        f"At x = {x} this is {3 * a} * {x**2} + {2 * b} * {x} + {c} = {3 * a * x**2} + {2 * b * x} + {c} = {value}.",
        f"The slope is {value}.",
    ]


def _percentage(draw: random.Random) -> Worked:
    price, up, down = 20 * draw.randint(5, 60), 5 * draw.randint(1, 8), 5 * draw.randint(1, 8)
    raised = Fraction(price * (100 + up), 100)
    final = raised * (100 - down) / 100
    return f"A price of {price} rises by {up}% and then falls by {down}%. What is it in the end?", [
        f"After the rise the price is {price} * {100 + up}/100 = {float(raised):g}.",
        f"After the fall it is {float(raised):g} * {100 - down}/100 = {float(final):g}.",
        "Note that the second percentage is taken of the raised price, not of the first one.",
    ]


def _determinant(draw: random.Random) -> Worked:
    a, b, c, d = (draw.randint(-9, 9) for _ in range(4))
    value = a * d - b * c
    verdict = "is invertible, because its determinant is not zero" if value else "has no inverse"
    return f"Is the matrix with rows ({a}, {b}) and ({c}, {d}) invertible?", [
        "The determinant of a matrix with rows (a, b) and (c, d) is ad - bc.",
        f"Here it is ({a})({d}) - ({b})({c}) = {a * d} - ({b * c}) = {value}.",
        f"So the matrix {verdict}.",
    ]


PROBLEMS = (_linear, _quadratic, _series, _divisor, _fractions, _derivative, _percentage, _determinant)


# ---- reasoning that repeats itself

NAMES = ("Mara", "Tobias", "Ines", "Joel", "Petra", "Samir", "Lena", "Oskar", "Nadia", "Victor")
THINGS = ("apples", "tiles", "bricks", "tickets", "candles", "coins", "pages", "boxes", "bottles", "stamps")
DOUBTS = (
    "Wait, let me check that again.",
    "Wait, is that right?",
    "Hmm, let me double-check this.",
    "Wait, maybe I made a mistake.",
    "Let me verify the calculation once more.",
    "Alternatively, let me think about it another way.",
    "Hold on, let me go through it again.",
)
RELIEFS = (
    "Yes, that is correct.",
    "Okay, so that matches what I had before.",
    "Right, so this is consistent.",
    "So the result is the same as before.",
    "Good, that confirms it.",
)


def repetitive(seed: int, characters: int = CHARACTERS) -> str:
    """Reasoning that derives, doubts, and derives again in the same or nearly the same words.

    Args:
        seed: of the drawing.
        characters: length at least.
    """
    draw = random.Random(f"repetitive {seed}")
    names, things = draw.sample(NAMES, 3), draw.sample(THINGS, 4)
    parts = [f"Okay, let me work through this problem about {', '.join(names[:2])} and {names[2]} step by step.\n\n"]
    known: list[_Step] = []
    while sum(map(len, parts)) < characters:
        known.append(_Step.drawn(draw, draw.choice(names), *draw.sample(things, 2)))
        parts.append(f"{known[-1]}\n\n")
        for _ in range(draw.randint(1, 4)):
            parts.append(draw.choice(DOUBTS) + draw.choice((" ", "\n\n")))
            parts.append(_again(draw, known))
        if len(known) >= 2 and draw.random() < 0.35:
            a, b = draw.sample(known, 2)
            total = f"{a.value} + {b.value} = {a.value + b.value}"
            parts.append(f"Now adding {a.formula} = {a.value} and {b.formula} = {b.value} gives {total}.\n\n")
    return "".join(parts)


class _Step:
    """A derivation: the sentence, its conclusion, the formula and its value."""

    def __init__(self, sentence: str, conclusion: str, formula: str, value: int) -> None:
        self.sentence, self.conclusion, self.formula, self.value = sentence, conclusion, formula, value

    def __str__(self) -> str:
        return f"{self.sentence} {self.conclusion}"

    @classmethod
    def drawn(cls, draw: random.Random, name: str, thing: str, other: str) -> _Step:
        a, b, c = draw.randint(3, 49), draw.randint(3, 49), draw.randint(2, 12)
        return draw.choice(
            (
                cls(
                    f"{name} has {a} {thing} and buys {b} more, so {name} has {a} + {b} = {a + b} {thing}.",
                    f"The number of {thing} is {a + b}.",
                    f"{a} + {b}",
                    a + b,
                ),
                cls(
                    f"Each of the {c} shelves holds {a} {thing}, so together they hold {c} * {a} = {c * a} {thing}.",
                    f"So there are {c * a} {thing} on the shelves.",
                    f"{c} * {a}",
                    c * a,
                ),
                cls(
                    f"If x + {a} = {a + b}, then x = {a + b} - {a} = {b}.", f"Therefore x is {b}.", f"{a + b} - {a}", b
                ),
                cls(
                    f"The {thing} cost {a} cents each and the {other} cost {b} cents each, so {c} of both cost "
                    f"{c} * ({a} + {b}) = {c * (a + b)} cents.",
                    f"The total is {c * (a + b)} cents.",
                    f"{c} * ({a} + {b})",
                    c * (a + b),
                ),
                cls(
                    f"The rectangle is {a} wide and {c} high, so its area is {a} * {c} = {a * c}.",
                    f"The area comes to {a * c}.",
                    f"{a} * {c}",
                    a * c,
                ),
            )
        )


def _again(draw: random.Random, known: list[_Step]) -> str:
    """The newest derivation once more, an earlier one, or several in a row."""
    newest, relief, kind = known[-1], draw.choice(RELIEFS), draw.random()
    if kind < 0.45:
        return f"{newest} {relief}\n\n"
    if kind < 0.65:
        return f"We have {newest.formula} = {newest.value}. {relief} {newest.conclusion}\n\n"
    if kind < 0.85:
        earlier = draw.choice(known[-12:])
        return f"Earlier I found that {earlier.formula} = {earlier.value}. {earlier} {relief}\n\n"
    return "".join(f"{step}\n\n" for step in known[-draw.randint(2, 4) :]) + f"{relief}\n\n"


if __name__ == "__main__":
    print(list(KINDS[sys.argv[1]]())[int(sys.argv[2])])
