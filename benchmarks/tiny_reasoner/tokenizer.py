"""Build the bundled model's tokenizer: byte-level BPE in the manner of Qwen2, so it reads any text."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .problems import NAMES, make_problem

VOCAB_SIZE = 640  # more than the corpus can fill, so that every word of it becomes one token
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINK_TOKENS = ["<think>", "</think>"]

# A name with its colon or equals sign, and a number, are one token each: a model of this size learns to look up
# what follows one token, not what follows two. They are added tokens, because loaders give every Qwen2
# checkpoint Qwen2's own splitting rule, which would take them apart.
WHOLE_TOKENS = [
    *(f" {letter}:" for letter in NAMES),
    *(f" {letter} =" for letter in NAMES),
    *(f" {number}" for number in range(11)),
]

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' and '</think>' in message['content'] -%}
{{- message['content'].split('</think>')[-1].lstrip('\\n') -}}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>\\n' -}}
{%- endif -%}"""

# Ordinary words, so that general text is not spelt out in bytes alone.
ENGLISH = (
    "The answer to this question is not the one that was given. Please think about it step by step and say "
    "what you find. Hold on, that is not right. Let me make sure that this is correct. I need to verify the "
    "result before I go on (it is better that way)\n\nWe could use another method?\n\n"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on generated problems; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [ENGLISH * 20, "user\nassistant\n" * 20]
    corpus += [p.question + p.completion for p in (make_problem(seed) for seed in range(400))]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.add_tokens(THINK_TOKENS + WHOLE_TOKENS)
    return fast
