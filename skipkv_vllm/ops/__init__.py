"""The tensor operations of the package. Each is defined by its PyTorch reference in `reference.py`."""

from .reference import EPSILON, attention_received, importance, move_list, redundancy, sentence_penalties

__all__ = ["EPSILON", "attention_received", "importance", "move_list", "redundancy", "sentence_penalties"]
