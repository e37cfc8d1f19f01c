"""Python runs this at the start of worker processes: it repeats the parent's `triton_cpu.enable`."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import triton_cpu

    triton_cpu.register_backend()
    triton_cpu.make_faster()
    triton_cpu.take_masks_of_integers()
