"""Traces: one safetensors file per finished request that says which tokens were held when.

The workers know what was kept, the scheduler knows the text and when a request ends. Each worker leaves a
part per compaction in `<trace-dir>/.parts`; when the request ends the scheduler joins them. With workers on
several machines the folder must be on a file system they share. Nothing of this exists when tracing is off.

All files are read and written by a thread of each process. A trace that cannot be written is dropped, logged and
counted. Only an idle engine waits for the storage, for a quarter of a second.
"""

from .files import Trace, trace_path

__all__ = ["Trace", "trace_path"]
