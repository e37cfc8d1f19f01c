"""Activation steering: vector files, their extraction and import. Imports no vLLM."""

from .vectors import SteeringVector, tokenizer_digest

__all__ = ["SteeringVector", "tokenizer_digest"]
