"""`skipkv doctor`: what is installed, what runs each operator here, and what would make it faster."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from ..core.errors import KVPolicyError
from ..integration.compat import version as gate
from ..integration.compat.public import SEAMS, is_public
from ..ops.dispatch import report

PACKAGES = ("skipkv-vllm", "vllm", "torch", "triton", "transformers")


class Findings(NamedTuple):
    """What the doctor saw.

    Attributes:
        lines: the report; what needs attention begins with "!".
        healthy: whether nothing does.
    """

    lines: list[str]
    healthy: bool


def examine() -> Findings:
    """Look at this environment; starts no engine."""
    lines = ["packages", *(f"  {name:20}{_version(name)}" for name in PACKAGES), "", "vLLM's interfaces"]
    problems = []
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        lines.append(f"  read from {gate.vllm_root()}")
        gate.check_version()
        gate.check_sources()
        lines += _gate_lines()
        lines += ["", "seams (patches/README.md)", *_seam_lines()]
    except ImportError as error:
        problems.append(f"vLLM cannot be imported ({error}); install it: pip install 'vllm=={gate.SUPPORTED_VLLM}.*'")
    except KVPolicyError as error:
        problems.append(str(error))
    for device_type in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        choices = report(device_type)
        lines += ["", f"operators on {device_type}", *(f"  {op:20}{c.backend}" for op, c in choices.items())]
        # On a GPU a slower backend costs little; PyTorch is slow everywhere.
        missed = {why for choice in choices.values() for why in choice.missed}
        if any(choice.backend == "torch" for choice in choices.values()):
            problems += sorted(missed)
        else:
            lines += [f"  not used: {why}" for why in sorted(missed)]
    return Findings([*lines, "", *(f"! {problem}" for problem in problems)], not problems)


def _gate_lines() -> list[str]:
    found = gate.differences(gate.vllm_root())
    if not found:
        return [f"  {len(gate.tested()['symbols'])} classes and methods are as they were tested"]
    # Reached only where the operator allowed it; every difference in full.
    return [f"  UNTESTED, allowed by {gate.OVERRIDE}=1:", *(f"    {difference}" for difference in found)]


def _seam_lines() -> list[str]:
    return [
        f"  {name:30}{f'public (patch {seam.patch})' if is_public(name) else f'runtime hook: {seam.hook}'}"
        for name, seam in SEAMS.items()
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
