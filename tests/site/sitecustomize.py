"""Python runs this first in processes that find it: worker processes get what `triton_cpu.enable` gave their parent."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import triton_cpu

    triton_cpu.register_backend()
