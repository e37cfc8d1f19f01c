"""`skipkv doctor`: what is installed, what runs each operator here, and what would make it faster."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from ..compat import gate
from ..errors import KVPolicyError
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
    try:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        gate.check_version()
        gate.check_signatures()
        lines.append(f"  {len(gate.SIGNATURES)} methods look as they did when they were tested")
    except ImportError as error:
        problems.append(f"vLLM cannot be imported ({error}); install it: pip install 'vllm=={gate.SUPPORTED_VLLM}.*'")
    except KVPolicyError as error:
        problems.append(str(error))
    for device_type in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        choices = report(device_type)
        lines += ["", f"operators on {device_type}", *(f"  {op:20}{c.backend}" for op, c in choices.items())]
        # On a GPU a slower backend costs little; PyTorch is slow everywhere.
        missed = {why for choice in choices.values() for why in choice.missed}
        if any(choice.backend == "reference" for choice in choices.values()):
            problems += sorted(missed)
        else:
            lines += [f"  not used: {why}" for why in sorted(missed)]
    return Findings([*lines, "", *(f"! {problem}" for problem in problems)], not problems)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
