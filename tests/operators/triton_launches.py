"""Triton's launches without a GPU: record what the operators launch, and compile it for GPUs that are not here.

Triton itself turns the arguments of a launch into a signature, so a recorded launch has the types, constants and
specialisations that a GPU would compile.

    python -m tests.operators.triton_launches

prints what every kernel uses, for all dtypes and head sizes, in about ten minutes.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from skipkv_vllm.ops import triton_kernels

ARCHITECTURES = (80, 90)
"""Compute capabilities to compile for."""
WARP = 32


class Launch(NamedTuple):
    """What Triton compiles for a launch.

    Attributes:
        kernel: the function.
        key: Triton's own key of its cache of compiled kernels; types, specialisations and constants.
        signature, constants, attributes: of `ASTSource`.
        options: of the compiler.
    """

    kernel: JITFunction
    key: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Module and name of the kernel."""
        return f"{self.kernel.module.rpartition('.')[2]}.{self.kernel.__name__}"


class Resources(NamedTuple):
    """What a thread or a block of a compiled kernel uses: registers, and bytes of stack, local and shared memory."""

    registers: int
    stack: int
    local: int
    shared: int


class _NoGpu:
    """Stands in for Triton's driver."""

    def get_current_device(self) -> str:
        return "recorded"  # a device of its own, whose kernels are never compiled

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURES[0], WARP)

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches in a block instead of running them; what the operators return is arbitrary."""
    launches: list[Launch] = []

    def record(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:  # noqa: A002 - Triton's name
        options = {name: compile[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        launches.append(Launch(fn.jit_function, key, compile["signature"], compile["constants"], attributes, options))
        return True  # do not compile, and do not launch either

    active, hook = driver._active, knobs.runtime.jit_cache_hook
    driver.set_active(_NoGpu())
    knobs.runtime.jit_cache_hook = record
    try:
        yield launches
    finally:
        knobs.runtime.jit_cache_hook = hook
        driver._active = active


def compiled(launch: Launch, architecture: int) -> Any:
    """Compile a launch for a compute capability.

    Raises:
        triton.CompilationError: Triton does not accept the kernel.
    """
    source = triton.compiler.ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options=launch.options)


def resources(kernel: Any) -> Resources:
    """Read what a compiled kernel uses."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    # A launch adds the dynamic shared memory, of which the binary knows nothing.
    return Resources(found["REG"], found["STACK"], found["LOCAL"], kernel.metadata.shared)


@functools.cache
def all_kernels() -> frozenset[str]:
    """Return module and name of every kernel: the functions in `triton_kernels` that no other one calls."""
    kernels, called = set(), set()
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        for name, value in vars(import_module(f"{triton_kernels.__name__}.{module.name}")).items():
            if isinstance(value, JITFunction) and value.module.endswith(f".{module.name}"):
                kernels.add(f"{module.name}.{name}")
                calls = (node.func for node in ast.walk(value.parse()) if isinstance(node, ast.Call))
                called |= {call.id for call in calls if isinstance(call, ast.Name)}
    return frozenset(kernel for kernel in kernels if kernel.partition(".")[2] not in called)


def main() -> None:
    """Print registers, and bytes of stack and of shared memory, of every kernel for each dtype and head size."""
    from tests.operators.triton_calls import (
        CACHES,
        DIMS,
        LATENTS,
        OF_CACHES,
        OTHERS,
        RECALLING,
        VARIANTS,
        Server,
        Traffic,
    )

    servers = [*(Server(cache, dim) for cache in CACHES for dim in DIMS), LATENTS]
    printed = set()
    for server, calls in [
        *((each, OF_CACHES if each is LATENTS else (*OF_CACHES, *RECALLING)) for each in servers),
        (LATENTS, VARIANTS),
        (Server(), (*OTHERS, *VARIANTS)),
    ]:
        with recorded() as launches:
            for call in calls:
                call(server, Traffic())
        for launch in launches:
            if (launch.name, launch.key) in printed:
                continue
            printed.add((launch.name, launch.key))
            for architecture in ARCHITECTURES:
                used = resources(compiled(launch, architecture))
                what = f"{str(server.cache).removeprefix('torch.'):14}{server.dim:4}  sm_{architecture}"
                print(f"{launch.name:32}{what}  {used.registers:3} {used.stack:5} {used.shared:6}", flush=True)


if __name__ == "__main__":
    main()
