"""With an unsupported vLLM, the installed plugin changes nothing until a policy is configured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.server import serve
from skipkv_vllm import bundled_model
from skipkv_vllm.integration.compat import version as version_check
from tests.engine.test_server import free_port, post
from tests.harness import REPOSITORY

VERSION = "0.33.0"
OVERLAY = REPOSITORY / "build" / f"vllm-{VERSION}"
ARGUMENTS = ["--dtype=float32", "--max-model-len=512", "--block-size=32", "--enforce-eager"]
PROMPT = list(range(100, 180))

STOCK = f"""
import json, sys
from vllm import LLM, SamplingParams, __version__
assert __version__.startswith({VERSION!r}), __version__
if __name__ == "__main__":
    llm = LLM({bundled_model()!r}, dtype="float32", max_model_len=512, block_size=32, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    outputs = llm.generate([{{"prompt_token_ids": {PROMPT}}}], params, use_tqdm=False)
    assert "skipkv_vllm" not in sys.modules
    print(json.dumps(outputs[0].outputs[0].token_ids))
"""


@pytest.fixture(scope="module")
def other_vllm():
    """Environment of processes that import the other vLLM."""
    command = [sys.executable, str(REPOSITORY / "scripts" / "overlay_vllm.py"), VERSION, str(OVERLAY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"vLLM {VERSION} cannot be had here: {done.stderr.splitlines()[-1]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(OVERLAY))
        for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", version_check.OVERRIDE):
            patch.delenv(name, raising=False)
        yield


@pytest.mark.usefixtures("other_vllm")
def test_a_server_without_a_policy_answers_as_stock_vllm_does(tmp_path):
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
    assert f"version {VERSION}" in text
    assert "skipkv" in text, "the plugin was loaded"
    assert "SkipKV" not in text
    assert "Traceback" not in text


@pytest.mark.usefixtures("other_vllm")
def test_a_policy_is_refused_there_by_the_version():
    vllm = Path(sys.executable).with_name("vllm")
    command = [vllm, "serve", bundled_model(), "--kv-policy", "skipkv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    for part in (
        f"supports vLLM {version_check.SUPPORTED_VLLM}.x, but {VERSION} is installed",
        "pip install",
        "without --kv-policy",
    ):
        assert part in done.stderr
