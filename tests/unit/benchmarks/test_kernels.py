"""The benchmark of the operators: its R-KV-style code computes the same, its figures make a page, its bars can fail."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.kernels import __main__ as command_line
from benchmarks.kernels import rkv_style
from benchmarks.kernels.bench import MIX, POOL, THRESHOLD, Settings, make_request, needed_flops
from benchmarks.results.sections.operators import operators_section
from benchmarks.results.store import OPERATORS
from skipkv_vllm.ops import native, torch_backend

SETTINGS = Settings((200,), 40, 2, 2, 4, 32, 8, 16, "vec", "float32", 1, 0.0)


@pytest.mark.parametrize("keys", ["distinct", "similar"])
def test_rkv_style_code_scores_the_same(keys):
    request = make_request(SETTINGS, 200, keys)
    wanted = torch_backend.score_tokens(*request.scoring())[0, ..., :-8]
    for i, layer in enumerate(request.layers):
        options = {"pool": POOL, "mix": MIX, "threshold": THRESHOLD}
        got = rkv_style.score(layer, request.table[0].long(), 200, request.queries[0, i], **options)
        torch.testing.assert_close(got, wanted[i], rtol=1e-4, atol=1e-7)


def test_rkv_style_code_keeps_the_best_and_the_window():
    request = make_request(SETTINGS, 200, "similar")
    layer, table = request.layers[0], request.table[0].long()
    scores = torch_backend.score_tokens(*request.scoring())[0, 0, :, :-8]
    kept = rkv_style.survivors(scores, 160, 8)
    keys, values = (cell.read_pages(table, 200).clone() for cell in layer.cells)
    rkv_style.rewrite(layer, table, 200, kept)
    for cell, before in zip(layer.cells, (keys, values), strict=True):
        assert torch.equal(cell.read_pages(table, 160), before.gather(1, kept[..., None].expand(-1, -1, 32)))
    assert torch.equal(kept[:, -8:], torch.arange(192, 200).expand(2, -1))
    assert set(kept[0, :-8].tolist()) == set(scores[0].topk(152).indices.tolist())


def test_flops_of_two_keys():
    # One pair, and one older key for the query of each of two heads: 32 products and sums each; 2 layers of 2 heads.
    assert needed_flops(Settings((2,), 1, 2, 2, 4, 32, 1, 1, "rows", "float32", 1, 0.0), 2) == 2 * 2 * 64 * (1 + 2)


def test_command_line_and_page(tmp_path, capsys):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    out = tmp_path / OPERATORS
    words = ["--lengths", "96", "--buffer", "32", "--layers", "1", "--heads", "2", "--query-heads", "4", "--dim", "32"]
    command_line.main([*words, "--threads", "1", "--repeats", "1", "--seconds", "0", "--out", str(out)])
    assert "no head moves more tokens than the buffer" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert [row["keys"] for row in figures["scoring"]] == ["distinct", "similar"]
    assert all(row["relative_error"] < 1e-5 for row in figures["scoring"])
    assert all(number > 0 for number in figures["measuring"][0].values())
    row = figures["compaction"][0]
    assert row["bytes"] == row["fewest_bytes"] <= row["rewrite_bytes"] // 2
    assert row["most_moved_per_head"] <= 32
    page = "\n\n".join(operators_section(figures))
    assert page.count("| 96 |") == 3
    assert "python -m benchmarks.kernels --lengths 96" in page


def test_bars_can_be_missed():
    scoring = [{"length": 2176, "speedup_over_rkv": 7.9, "of_matmul": 0.49}]
    compaction = [{"budget": 1024, "buffer": 128, "most_moved_per_head": 129, "speedup_over_rewrite": 4.9}]
    assert [reached for _, reached in command_line.check_bars(scoring, compaction).values()] == [False] * 4
    scoring = [{"length": 2176, "speedup_over_rkv": 8.0, "of_matmul": 0.5}]
    compaction = [{"budget": 1024, "buffer": 128, "most_moved_per_head": 128, "speedup_over_rewrite": 5.0}]
    assert [reached for _, reached in command_line.check_bars(scoring, compaction).values()] == [True] * 4
