"""Activation steering: vector files, token tables and the host's counts; `extraction` makes and imports vectors."""

from .vectors import SteeringVector, tokenizer_digest

__all__ = ["SteeringVector", "tokenizer_digest"]
