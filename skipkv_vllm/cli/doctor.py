"""`skipkv doctor`: what is installed, which backend runs each operator here, and how to get a faster one."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from ..core.errors import KVPolicyError
from ..integration.compat import version as version_check
from ..integration.compat.seams import SEAMS, is_public
from ..ops.dispatch import report

PACKAGES = ("skipkv-vllm", "vllm", "torch", "triton", "transformers")


class Findings(NamedTuple):
    """Result of an examination.

    Attributes:
        lines: the report; a problem begins with "!".
        healthy: whether there is no problem.
    """

    lines: list[str]
    healthy: bool


def examine() -> Findings:
    """Examine this environment without starting an engine."""
    tested = [version_check.record_of(each)["vllm"] for each in version_check.supported()]
    lines = ["packages", *(f"  {name:20}{_version(name)}" for name in PACKAGES), "", "vLLM's interfaces"]
    problems = []
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        lines.append(f"  read from {version_check.vllm_root()}")
        lines.append(f"  this release was tested with {' and '.join(tested)}")
        version_check.check_version()
        version_check.check_sources()
        lines += _source_lines()
        lines += ["", "seams (patches/README.md)", *_seam_lines()]
    except ImportError as error:
        remedy = version_check.install_command(tested[-1])
        problems.append(f"vLLM cannot be imported ({error}); install it: {remedy}")
    except KVPolicyError as error:
        problems.append(str(error))
    for device_type in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        choices = report(device_type)
        lines += ["", f"operators on {device_type}", *(f"  {op:20}{c.backend}" for op, c in choices.items())]
        # On a GPU a slower backend costs little; the PyTorch backend is slow everywhere.
        missed = {why for choice in choices.values() for why in choice.missed}
        if any(choice.backend == "torch" for choice in choices.values()):
            problems += sorted(missed)
        else:
            lines += [f"  not used: {why}" for why in sorted(missed)]
    return Findings([*lines, "", *(f"! {problem}" for problem in problems)], not problems)


def _source_lines() -> list[str]:
    found = version_check.differences(version_check.vllm_root())
    if not found:
        return [f"  {len(version_check.tested()['symbols'])} classes and functions are as tested"]
    # Reached only if the operator allowed an untested vLLM.
    return [f"  UNTESTED, allowed by {version_check.OVERRIDE}=1:", *(f"    {difference}" for difference in found)]


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
