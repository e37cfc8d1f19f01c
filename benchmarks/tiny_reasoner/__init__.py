"""The bundled reasoning model: its problems, its tokenizer and the script that trains it."""

PAPER_PARAMETERS = {"compat": "paper", "similarity_threshold": 0.85}
"""The paper's rule of `skipkv` for this model; the threshold is above every pair of different sentences, see
`similarity.py`."""
