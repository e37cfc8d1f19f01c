"""The content of the blocks in `engine`, and its requests as the model knows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.v1.request import Request

from skipkv_vllm.core.limits import Limits

PAGE = 4
MAX_MODEL_LEN = 400
LONGEST = 60
"""length at which a request ends"""


class Token(NamedTuple):
    """Content of one slot: what the KV of a token depends on."""

    position: int
    prefix: int
    """hash of all token ids up to and including this one"""
    private: str | None
    """request and life that computed it from an already evicted cache"""


class Order(NamedTuple):
    request_id: str
    num_resident: int
    num_keep: int
    protected: int
    window: int
    num_logical: int
    source_blocks: list[int]
    target_blocks: list[int]


@dataclass
class Tracked:
    """A request as the model knows it."""

    request: Request
    limits: Limits | None
    held: set[Token] = field(default_factory=set)
    chain: list[int] = field(default_factory=list)
    life: int = 0
    num_evicted: int = 0
    written: dict[int, Token] = field(default_factory=dict)
    """every token that it computed or found in the prefix cache, by position"""

    def prefix(self, position: int) -> int:
        """Hash of the token ids up to `position`."""
        tokens = self.request.all_token_ids
        while len(self.chain) <= position:
            before = self.chain[-1] if self.chain else 0
            self.chain.append(hash((before, tokens[len(self.chain)])))
        return self.chain[position]

    def pure(self, position: int) -> Token:
        return Token(position, self.prefix(position), None)
