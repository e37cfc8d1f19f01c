"""Python runs this at the start of worker processes: it repeats the parent's `triton_cpu.enable`."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import triton_cpu

    triton_cpu.prepare()
