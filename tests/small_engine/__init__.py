"""An engine without vLLM around the real scheduler's side and the real worker's side of eviction, on a CPU or a GPU.

It is small enough to be checked token by token, and it does what an engine does: prompts in chunks, ragged requests
that come and go, a paged cache, decoding through a CUDA graph with padded rows. On a CPU a recording of the operations
takes the place of the graph.

One file per concern: `shape` (model and cache), `traffic` (requests), `servers` (what is tested), `blocks` (block
manager), `scheduler`, `pages` (paged cache), `attention`, `model`, `buffers` (what a forward pass reads), `worker` (the
runtime under test), `engine` (the steps), `log` (every token as it was computed), `definition` (survivors by the
policies' definitions), `checks` (what is verified after a step).
"""

from tests.small_engine.engine import Engine, Report
from tests.small_engine.servers import SERVERS, Server, shape_for
from tests.small_engine.shape import Shape
from tests.small_engine.traffic import Traffic

__all__ = ["SERVERS", "Engine", "Report", "Server", "Shape", "Traffic", "shape_for"]
