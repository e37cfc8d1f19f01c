"""Prompts for tests."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tests.harness.settings import MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def chat_prompt(question: str) -> list[int]:
    """Return the token ids of a user's question, up to the answer."""
    messages = [{"role": "user", "content": question}]
    return tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def demo_prompts(count: int, at_least: int = 0) -> list[list[int]]:
    """Return prompts that share less than a block: one question each, or as many as make `at_least` tokens."""
    from benchmarks.tiny_reasoner.problems import problems

    questions = iter([problem.question for problem in problems("demo", 32 * count)])
    prompts = []
    for _ in range(count):
        text = next(questions)
        while len(chat_prompt(text)) < at_least:
            text += "\n" + next(questions)
        prompts.append(chat_prompt(text))
    return prompts
