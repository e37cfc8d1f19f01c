"""The bundled reasoning model: its problems, its tokenizer and the script that trains it."""

SKIPKV_PARAMETERS = {"similarity_threshold": 0.85}
"""Parameters of `skipkv` for this model: above every pair of different sentences, see `similarity.py`."""
