"""The policy in CONTRIBUTING.md works when it is pasted."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import torch

from skipkv_vllm.policies import View, base, make_policy
from skipkv_vllm.policies.table import row

TEXT = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()


def test_the_policy_of_the_guide_scores_and_is_selectable(monkeypatch):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S).group(1)
    lines = [line.removeprefix("   ") for line in code.splitlines()]
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    module = module_from_spec(spec_from_loader("skipkv_vllm.policies.my_method", loader=None))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile("\n".join(lines), "CONTRIBUTING.md", "exec"), module.__dict__)

    policy = make_policy("key_norm", {"power": 2.0})
    keys = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])
    view = View(positions=torch.tensor([[0, 1]]), window=1, keys=keys)
    torch.testing.assert_close(policy.score(view), torch.tensor([[-25.0, -1.0]]))
    # A complete line of docs/reference/methods.md.
    assert all(part in row(policy) for part in ("`key_norm`", "arxiv.org/abs/2406.11430", "`power` (2.0)", "O(L D)"))
    assert "?" not in row(policy)
