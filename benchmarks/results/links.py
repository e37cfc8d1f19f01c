"""Pages of the documentation that the pages of results link to, as seen from `docs/results/`."""

EVALUATION = "../guides/evaluation.md"
"""Fidelity and recall: what they measure, and how."""
SCHEDULING = "../guides/capacity-and-admission.md"
"""Batch grouping."""
