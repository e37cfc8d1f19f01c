"""Steering: the strength that each token of a step gets, and its addition to the hidden states."""

from __future__ import annotations

import torch
from torch import Tensor


class THOUGHT:
    """Flags of a token in the `vocabulary` of `track_thoughts`."""

    SPLIT = 1
    """Lies between two thoughts, so it is steered."""
    DELIMITER = 2
    """Ends a sentence."""
    BEGIN = 4
    """Begins the thinking."""
    END = 8
    """Ends the thinking."""


KEYWORD_SHIFT = 4
"""Bit of an entry of `vocabulary` where the token's keyword class begins."""

STATE = (
    "vector",
    "thinking",
    "kinds",
    "machine",
    "after_delimiter",
    "latched",
    "execution",
    "reflection",
    "transition",
    "steered",
)
"""Columns of the `state` of `track_thoughts`: row of the request's vector; whether it is thinking; kinds of the
keywords in the open sentence, and state of the machine that finds them; whether the last token was a delimiter; the N
in use; closed sentences by kind; steered tokens."""


def track_thoughts(
    token_ids: Tensor,
    spans: Tensor,
    vocabulary: Tensor,
    keywords: Tensor,
    merge: bool,
    interval: int,
    strengths: Tensor,
    state: Tensor,
    written: int,
    choice: Tensor,
    coefficient: Tensor,
) -> None:
    """Compute the steering strength of each token of a step, and count thoughts: SkipKV's `alpha = alpha0 + gamma * N`.

    N is the number of closed sentences that are not executions. It is taken over after each position whose successor is
    a multiple of `interval`. A token is steered if it ends a thought within <think> and </think>. Only committed tokens
    count, so the same tokens always get the same coefficients.

    Args:
        token_ids: integer `[T]`, all tokens of the step.
        spans: int64 `[4, R]`; of each request its row of the state (all different), its first token in the step, the
            number of its tokens and the logical position of the first.
        vocabulary: int32 `[vocabulary]`: flags of `THOUGHT` and, from bit `KEYWORD_SHIFT` on, the token's keyword
            class, 0 for tokens of no keyword.
        keywords: int32 `[states, classes]`, a machine that finds keywords: its next state after a token, times 4, plus
            the kinds (1 reflection, 2 transition) of the keywords that the token completes.
        merge: whether a delimiter right after another one closes nothing.
        interval: positions after which N is taken over.
        strengths: float32 `[rows, 3]`: alpha0, gamma and the largest alpha.
        state: int32 `[rows, len(STATE)]`, see `STATE`.
        written: leading entries of `choice` that earlier steps may have set; they are cleared first.
        choice: int32 `[>= T]`, afterwards the vector of each steered token and 0 for the others.
        coefficient: float32 `[>= T]`, of steered tokens.
    """
    choice[:written] = 0
    ids, bits, machine = token_ids.tolist(), vocabulary.tolist(), keywords.tolist()
    for row, begin, number, position in spans.T.tolist():
        now = dict(zip(STATE, state[row].tolist(), strict=True))
        alpha0, gamma, most = strengths[row].double().tolist()
        for t in range(begin, begin + number):
            flags = bits[ids[t]]
            _read_keyword(now, machine, flags)
            if now["thinking"] and flags & THOUGHT.SPLIT and (alpha := min(alpha0 + gamma * now["latched"], most)):
                choice[t], coefficient[t] = now["vector"], alpha
                now["steered"] += 1
            _close_sentence(now, flags, merge)
            if (position + t - begin + 1) % interval == 0:
                now["latched"] = now["reflection"] + now["transition"]
        state[row] = torch.tensor(list(now.values()), dtype=torch.int32)


def steer_add(hidden: Tensor, coefficient: Tensor, choice: Tensor, vectors: Tensor) -> Tensor:
    """Add `coefficient * vectors[choice]` to each token's hidden state; tokens of choice 0 stay the same, bit by bit.

    Args:
        hidden: `[T, E]`.
        coefficient: float32 `[>= T]`.
        choice: int32 `[>= T]`, index into `vectors`; 0 for tokens that are not steered.
        vectors: float32 `[vectors, E]`; the first is unused.

    Returns:
        `[T, E]` in the dtype of `hidden`; computed in float32.
    """
    tokens = hidden.shape[0]
    choice, coefficient = choice[:tokens], coefficient[:tokens]
    steered = (hidden.float() + coefficient[:, None] * vectors[choice.long()]).to(hidden.dtype)
    return torch.where((choice == 0)[:, None], hidden, steered)


def _read_keyword(now: dict[str, int], machine: list[list[int]], flags: int) -> None:
    """Advance the keyword machine and the mode by a token."""
    step = machine[now["machine"]][flags >> KEYWORD_SHIFT]
    now["machine"], now["kinds"] = step >> 2, now["kinds"] | step & 3
    if flags & (THOUGHT.BEGIN | THOUGHT.END):
        now["thinking"] = int(not flags & THOUGHT.END)


def _close_sentence(now: dict[str, int], flags: int, merge: bool) -> None:
    """Count the sentence that a delimiter closes, by its kind."""
    if flags & THOUGHT.DELIMITER:
        if not (merge and now["after_delimiter"]):
            now[("execution", "reflection", "transition", "reflection")[now["kinds"]]] += 1
        now["machine"] = now["kinds"] = 0
    now["after_delimiter"] = int(bool(flags & THOUGHT.DELIMITER))
