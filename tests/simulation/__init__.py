"""A worker without vLLM, and a dense copy of every request that is compacted a second time from the formulas.

One file per concern: `model` (shape and layers), `request`, `pool` (KV cache), `planning` (the scheduler's decisions),
`worker` (the runtime under test), `decoder` (tokens computed ahead), `dense` with `sentences` and `formulas`
(compactions in plain loops), `simulation` (the steps).
"""

from tests.simulation.model import CPU, DOT, HIDDEN, KV_HEADS, LAYERS, FakeAttention, FakeBlock, gates, gates_file
from tests.simulation.sentences import sentences_of
from tests.simulation.simulation import Simulation

__all__ = [
    "CPU",
    "DOT",
    "HIDDEN",
    "KV_HEADS",
    "LAYERS",
    "FakeAttention",
    "FakeBlock",
    "Simulation",
    "gates",
    "gates_file",
    "sentences_of",
]
