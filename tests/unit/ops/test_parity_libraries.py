"""The compiled libraries: their schema, the errors of their operators, and the message if one is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipkv_vllm.ops import native
from skipkv_vllm.ops.schema import NATIVE
from tests.operators.backends import Backend, cases, each_backend, isa, on  # noqa: F401
from tests.operators.cases import CompactCase, ScoreCase
from tests.unit.ops.test_parity_sentences import BF16

LIBRARIES = [device for device in ("cpu", "cuda") if native.unavailable(device) is None]


@pytest.mark.parametrize("device", LIBRARIES)
@pytest.mark.parametrize("op", sorted(NATIVE))
def test_the_library_has_the_schema(device, op):
    registered = str(getattr(getattr(torch.ops, f"skipkv_{device}"), op).default._schema)
    wanted = str(getattr(torch.ops.skipkv, op).default._schema)
    assert registered == wanted.replace("skipkv::", f"skipkv_{device}::")


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "length within the window": ("score", {"num_resident": torch.tensor([8, 33], dtype=torch.int32)}, "window"),
    "length beyond the slots": ("score", {"num_resident": torch.tensor([75, 99], dtype=torch.int32)}, "at most"),
    "page that is not there": ("score", {"table": torch.full((2, 5), 99, dtype=torch.int32)}, "names page 99 of"),
    "negative page": ("score", {"table": torch.full((2, 5), -1, dtype=torch.int32)}, "names page -1 of"),
    "table too narrow": ("score", {"table": torch.ones(2, 1, dtype=torch.int32)}, "has 1 pages"),
    "int64 table": ("score", {"table": torch.ones(2, 5, dtype=torch.int64)}, "table must be Int"),
    "even pool": ("score", {"pool": 4}, "must be odd"),
    "queries in another dtype": ("score", {"queries": torch.zeros(2, 2, 8, 4, 64, dtype=BF16)}, "queries must be"),
    "unknown layout": ("score", {"layout": 4}, "layout must be"),
    "no caches": ("score", {"caches": []}, "must not be empty"),
    "layers that differ": ("score", {"caches": [torch.zeros(9, 2, 16, 128), torch.zeros(9, 2, 16, 64)]}, "alike"),
    "float64": ("score", {"caches": [torch.zeros(9, 2, 16, 128).double()] * 2}, "must be float32"),
    "hole beyond what is kept": ("compact", {"hole": 40}, "move from slot"),
    "source beyond the row": ("compact", {"source": 78}, "move from slot"),
    "more moves than given": ("compact", {"count": 99}, "count=99"),
    "target page that is not there": ("compact", {"target_table": 99}, "names page 99"),
    "sidecar of another shape": ("compact", {"sidecar": torch.zeros(2, 9, 2, 8, dtype=torch.int32)}, "sidecar"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    op, change, message = BAD[name]
    arguments = ScoreCase().build() if op == "score" else CompactCase().build()
    for key, value in change.items():
        old = getattr(arguments, key)
        arguments = arguments._replace(
            **{key: torch.full_like(old, value) if isinstance(old, torch.Tensor) and isinstance(value, int) else value}
        )
    with pytest.raises(RuntimeError, match=message):
        native.score_tokens(*arguments) if op == "score" else native.compact_pages(*arguments)


def test_a_missing_library_is_reported_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv(native.OVERRIDES["cpu"], str(tmp_path / "nowhere.so"))
    assert "nowhere.so was not built; run `pip install" in str(native._cannot_load.__wrapped__("cpu"))
    (tmp_path / "nowhere.so").write_text("this is no library")
    assert "cannot be loaded" in str(native._cannot_load.__wrapped__("cpu"))
    assert "has no operators for mps" in str(native.unavailable("mps"))


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    monkeypatch.setitem(native.SCHEMAS, "steer_add", "(Tensor hidden, float coefficient) -> Tensor")
    monkeypatch.setitem(native.SCHEMAS, "new_op", "(Tensor hidden) -> Tensor")
    monkeypatch.setattr(native, "NATIVE", {*native.NATIVE, "new_op"})
    assert "was built from other sources (steer_add, new_op differ); run" in str(native._cannot_load.__wrapped__("cpu"))
