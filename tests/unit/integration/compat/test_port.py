"""What `port` prints of a new vLLM: each watched symbol that differs, how it is used, and the tests that cover it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from skipkv_vllm.integration.compat import port, source_hashes, watched
from skipkv_vllm.integration.compat import version as version_check

THIS = version_check.minor(version_check.vllm_version())
POOL = "v1/core/block_pool.py"
QUEUE = "v1/core/kv_cache_utils.py"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """The watched files of this vLLM in a folder of their own."""
    for folder in ("v1", "engine", "entrypoints"):
        (tmp_path / "vllm" / folder).mkdir(parents=True)
    for file in version_check.tested()["files"]:
        source, target = version_check.vllm_root() / file, tmp_path / "vllm" / file
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return tmp_path / "vllm"


def compare(new: Path) -> list[port.Change]:
    return port.compare(version_check.vllm_root(), new, THIS)


def edit(path: Path, old: str, text: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, text))


def test_the_tested_code_has_no_changes(new):
    assert compare(new) == []
    assert list(port.report([], "0.33.0", "0.33.1", 109)) == [
        "vLLM 0.33.1 against the tested 0.33.0: 0 of 109 watched symbols differ"
    ]


def test_a_changed_body_is_shown_with_its_use_and_its_tests(new):
    edit(new / POOL, "    def get_num_free_blocks(self) -> int:", "    def get_num_free_blocks(self, kind=0) -> int:")
    (change,) = compare(new)
    assert change.name == "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks"
    assert change.what == "has another signature"
    assert "-def get_num_free_blocks(self) -> int:" in change.diff
    assert "+def get_num_free_blocks(self, kind=0) -> int:" in change.diff
    lines = list(port.report([change], "0.33.0", "0.34.0", 109))
    assert "   use: relied on" in lines
    assert any(line.startswith("   tests: tests/engine/test_exactness.py") for line in lines)


def test_a_symbol_that_moved_is_found(new):
    text = (new / QUEUE).read_text()
    (new / "v1/core/queues.py").write_text(text)
    (new / QUEUE).write_text(text.replace("class FreeKVCacheBlockQueue", "class OtherQueue"))
    changes = {change.name.rpartition(".")[2]: change for change in compare(new)}
    assert changes["popleft"].what == "is missing"
    assert changes["popleft"].elsewhere == ["v1/core/queues.py"]
    assert port.use(changes["popleft"].name) == "overridden by GuardQueue"


def test_every_watched_symbol_has_a_use_and_tests_that_exist():
    root = Path(__file__).parents[4]
    for name in version_check.tested()["symbols"]:
        assert port.use(name)
        for test in port.tests_of(name):
            assert (root / test).exists(), test
    for name in (*watched.WRAPPED, *watched.RELIED_ON):
        assert name.startswith(max(watched.TESTS, key=lambda prefix: name.startswith(prefix)))
    assert source_hashes.source(version_check.vllm_root(), POOL, "BlockPool.nothing") is None


def test_a_version_that_does_not_exist_ends_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["port", "0.0.1", "--wheels", str(tmp_path)])
    monkeypatch.setattr(port.subprocess, "run", lambda command: port.subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match=r"cannot be downloaded; name a version that the package index has"):
        port.main()
