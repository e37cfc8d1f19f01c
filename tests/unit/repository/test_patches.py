"""The patches apply to the installed vLLM, alone and together, and each makes its seam public."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm

from skipkv_vllm.integration.compat import version
from skipkv_vllm.integration.compat.seams import SEAMS

REPOSITORY = Path(__file__).parents[3]
spec = importlib.util.spec_from_file_location("apply_patches", REPOSITORY / "patches" / "apply.py")
assert spec is not None
assert spec.loader is not None
apply_patches = importlib.util.module_from_spec(spec)
spec.loader.exec_module(apply_patches)

VERSION = vllm.__version__
PATCHES = apply_patches.patch_files(VERSION)
LOOK = """
import json
from skipkv_vllm.integration import compat
from skipkv_vllm.cli import doctor
from skipkv_vllm.integration.compat.seams import SEAMS, is_public
import vllm
compat.install()
compat.check_vllm()
public = [name for name in SEAMS if is_public(name)]
print(json.dumps({"vllm": vllm.__file__, "public": public, "doctor": doctor.examine().lines}))
"""


# These tests patch copies themselves.
COPIES = [folder for folder in sys.path if Path(folder, apply_patches.MARKER).exists()]
pytestmark = pytest.mark.skipif(bool(COPIES), reason="the suite runs with a patched copy")


def run_with(copy: Path, code: str) -> str:
    folders = [copy, REPOSITORY, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(copy: Path) -> dict[str, Any]:
    return json.loads(run_with(copy, LOOK).splitlines()[-1])


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """Return a copy of vLLM with all patches."""
    copy = tmp_path_factory.mktemp("patched")
    apply_patches.apply(PATCHES, copy)
    return copy


def test_every_seam_has_its_patch_and_every_patch_its_paragraph():
    assert [patch.name[:4] for patch in PATCHES] == [seam.patch for seam in SEAMS.values()]
    readme = (REPOSITORY / "patches" / "README.md").read_text()
    for patch in PATCHES:
        assert len(re.findall(rf"^## {re.escape(patch.stem)}$", readme, re.MULTILINE)) == 1, patch.stem


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_each_patch_applies_alone_and_passes_the_version_check(patch, tmp_path):
    apply_patches.apply([patch], tmp_path)
    assert version.differences(tmp_path / "vllm") == []
    for file in apply_patches.touched_files(patch):
        compile((tmp_path / file).read_text(), file, "exec")


def test_all_seams_are_seen_in_a_copy_with_all_patches(patched):
    found = look(patched)
    assert Path(found["vllm"]).is_relative_to(patched)
    assert found["public"] == list(SEAMS)
    report = "\n".join(found["doctor"])
    assert f"read from {patched}" in report
    for name, seam in SEAMS.items():
        assert re.search(rf"{re.escape(name)} +public \(patch {seam.patch}\)", report), name


def test_one_seam_is_seen_in_a_copy_with_one_patch(tmp_path):
    apply_patches.apply(apply_patches.patch_files(VERSION, ["0003"]), tmp_path)
    assert look(tmp_path)["public"] == ["orders to workers"]


def test_the_stock_vllm_has_no_seam():
    found = look(REPOSITORY)
    assert found["public"] == []
    for name, seam in SEAMS.items():
        assert re.search(rf"{re.escape(name)} +runtime hook: {re.escape(seam.hook)}", "\n".join(found["doctor"])), name


def test_with_the_seams_nothing_is_wrapped(patched):
    code = """
import importlib
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.plugins.engine_args import engine_args_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.stats import SchedulerStats
from skipkv_vllm import bundled_model
from skipkv_vllm.integration import compat, metrics  # a client loads the last
from skipkv_vllm.integration.compat.version import located
from skipkv_vllm.integration.compat.watched import POOL_CHECK

planning = importlib.import_module(located(POOL_CHECK).partition(":")[0])
parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
compat.install()  # plugins may be loaded several times
assert [plugin.name for plugin in engine_args_plugins()] == ["skipkv"]
arguments = parser.parse_args(["--model", bundled_model(), "--kv-policy", "rkv", "--kv-budget", "96"])
engine = AsyncEngineArgs.from_cli_args(arguments)
assert engine.additional_config["skipkv"]["kv_budget"] == 96
assert "EvictingCPUWorker" in engine.worker_cls
compat.enable(None)
compat.enable(None)
assert len(InputProcessor.request_validators) == len(planning.kv_cache_memory_checks) == 1
assert len(BaseServing.request_validators) == len(BeamSearchOfflineMixin.beam_search_validators) == 1
functions = EngineArgs.add_cli_args, EngineArgs.create_engine_config, InputProcessor.process_inputs
functions += BaseServing._check_model, BeamSearchOfflineMixin.beam_search
for function in (*functions, InputProcessor.__init__, planning._check_enough_kv_cache_memory):
    assert not hasattr(function, "__wrapped__"), function
assert "skipkv" not in SchedulerStats.__dataclass_fields__
output, stats = SchedulerOutput.make_empty(), SchedulerStats()
assert compat.received_orders(output) is None
assert compat.received_report(stats) is None
assert compat.received_report(None) is None
compat.send_orders(output, "orders")
compat.send_report(stats, {"compactions": 1.0})
assert output.extra == {"skipkv": "orders"} and compat.received_orders(output) == "orders"
assert compat.received_report(stats) == {"compactions": 1.0}
"""
    run_with(patched, code)


def test_a_copy_does_not_touch_the_original_and_is_small(patched):
    original = version.vllm_root()
    file = "v1/metrics/stats.py"
    assert (patched / "vllm" / file).read_text() != (original / file).read_text()
    assert not (patched / "vllm" / file).is_symlink()
    assert (patched / "vllm/model_executor").is_symlink()
    real = [path for path in patched.rglob("*.py") if path.is_file() and not path.is_symlink()]
    assert len(real) == len({f for patch in PATCHES for f in apply_patches.touched_files(patch)})


def test_a_patch_that_does_not_fit_is_named_and_leaves_nothing(tmp_path):
    wrong = tmp_path / "0009-wrong.patch"
    wrong.write_text(
        PATCHES[2]
        .read_text()
        .replace("class SchedulerOutput", "class AnotherOutput")
        .replace("from typing import TYPE_CHECKING", "from typing import OTHER")
    )
    with pytest.raises(apply_patches.PatchError, match=r"0009-wrong\.patch does not apply"):
        apply_patches.apply([wrong], tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_folder_with_something_else_is_not_deleted(tmp_path):
    (tmp_path / "vllm").mkdir()
    with pytest.raises(apply_patches.PatchError, match="is not a patched copy"):
        apply_patches.apply(PATCHES, tmp_path)
    assert (tmp_path / "vllm").is_dir()


def test_an_unknown_number_is_refused():
    with pytest.raises(apply_patches.PatchError, match=r"no patch begins with 0042; there are: 0001-engine"):
        apply_patches.patch_files(VERSION, ["0042"])
