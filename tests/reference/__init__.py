"""The oracle: eviction of running requests on Hugging Face transformers, for tests of the engine.

It shares no code with the package. It is written for clarity: one request, dense tensors, sentences and penalties from
scratch at every compaction. Axes are `layers`, `heads` (kv heads), `held` (tokens in the cache, ascending positions)
and `W` (the observation window).
"""
