"""Traces: one safetensors file per finished request that records which tokens were held when.

The workers know which tokens were kept; the scheduler knows the text and when a request ends. Each worker writes a part
per compaction into `<trace-dir>/.parts`, and the scheduler joins the parts when the request ends. With workers on
several machines the folder must be on a shared file system. When tracing is off, none of these objects exist.

All files are read and written by a thread of each process. A trace that cannot be written is dropped, logged and
counted. Only an idle engine waits for the storage, for a quarter of a second,
and a server that ends, for a few seconds.
"""

from .files import Trace, trace_path

__all__ = ["Trace", "trace_path"]
