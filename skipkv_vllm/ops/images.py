"""Which GPUs a library of CUDA operators can run on: those for which nvcc compiled it. Nothing here starts CUDA."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence

import torch

SYMBOL = "skipkv_images"
"""String in the library with its images, joined by "+", such as "sm_80+sm_90a+compute_90"; `csrc/cuda/library.cpp`."""

LEAST = (8, 0)
"""Compute capability that the kernels need: they multiply bfloat16 matrices and copy asynchronously."""

Capability = tuple[int, int]
"""Compute capability of a GPU, major and minor number."""

_IMAGE = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<suffix>[af]?)")


def images_of(path: str) -> tuple[str, ...] | None:
    """Return the images of a library, as nvcc names them; None if it does not tell.

    Args:
        path: of the library, which must be loadable.
    """
    try:
        text = ctypes.c_char.in_dll(ctypes.CDLL(path), SYMBOL)
    except (OSError, ValueError):
        return None
    return tuple(filter(None, ctypes.string_at(ctypes.addressof(text)).decode().split("+")))


def runs_on(image: str, capability: Capability) -> bool:
    """Return whether a GPU can run an image.

    Machine code (`sm_80`) runs on its GPU and on those of the same major number with a higher minor one; with "a" it
    runs on that GPU alone. The driver translates PTX (`compute_90`) for every newer GPU; with "a" for that GPU alone,
    and with "f" for those of the same major number. So says NVIDIA's "CUDA C++ Programming Guide".

    Raises:
        ValueError: nvcc has no image of this name.
    """
    found = _IMAGE.fullmatch(image)
    if found is None:
        raise ValueError(f"{image!r} is no image; expected a name such as sm_80, sm_90a or compute_90")
    own = (int(found["major"]), int(found["minor"]))
    if found["suffix"] == "a":
        return capability == own
    is_of_family = found["kind"] == "sm" or found["suffix"] == "f"
    return capability >= own and (capability[0] == own[0] or not is_of_family)


def capabilities() -> list[Capability]:
    """Return the compute capability of the current GPU, where CUDA has started; else those of all GPUs.

    The driver's management library knows them without starting CUDA, which a process that forks workers must not do. It
    lists also GPUs that `CUDA_VISIBLE_DEVICES` hides.

    Returns:
        One for each GPU; none if the driver does not answer.
    """
    if torch.cuda.is_initialized():
        return [torch.cuda.get_device_capability()]
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    try:
        return _listed(nvml)
    finally:
        nvml.nvmlShutdown()


def _listed(nvml: ctypes.CDLL) -> list[Capability]:
    count = ctypes.c_uint(0)
    found: list[Capability] = []
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return found
    for number in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(device)) != 0:
            continue
        if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) == 0:
            found.append((major.value, minor.value))
    return found


def misfit(name: str, images: Sequence[str], found: Iterable[Capability], rebuild: str) -> str | None:
    """Return why none of some GPUs can run a library, and the remedy; None if one can, or none is known.

    Args:
        name: of the library.
        images: that it has; none if unknown.
        found: the GPUs.
        rebuild: command that builds the library.
    """
    gpus = sorted(set(found))
    if not gpus or not images or any(runs_on(image, gpu) for image in images for gpu in gpus):
        return None
    named = " and ".join(f"{major}.{minor}" for major, minor in gpus)
    why = f"{name} was built for {', '.join(images)}, and the GPU has compute capability {named}"
    able = [f"{major}{minor}" for major, minor in gpus if (major, minor) >= LEAST]
    if not able:
        return f"{why}; it needs {LEAST[0]}.{LEAST[1]} or newer, so leave SKIPKV_OPS unset for Triton's operators"
    return (
        f"{why}; run `SKIPKV_CUDA_ARCHITECTURES={','.join(able)} {rebuild}` in a checkout, with a CUDA toolkit (nvcc)"
    )
