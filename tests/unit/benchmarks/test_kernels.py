"""The benchmark of the operators: its R-KV-style code computes the same, its figures make a page, its bars can fail."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.kernels import __main__ as command_line
from benchmarks.kernels import rkv_style
from benchmarks.kernels.bars import BARS, GPU_BARS, SHAPE, check_bars
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


@pytest.mark.parametrize(("keys", "share"), [("distinct", 0.0), ("similar", 0.9)])
def test_keys_are_as_distinct_as_they_are_called(keys, share):
    """A key has a similar one among the other 199 or not; requests lie in pages of their own."""
    request = make_request(SETTINGS, 200, keys, requests=2)
    assert len(request.table.unique()) == request.table.numel()
    for table in request.table.long():
        held = request.layers[0].keys.read_pages(table, 200)
        unit = held / held.norm(dim=-1, keepdim=True)
        # Of 32 features, random keys have a cosine of 0.18 on average, and those of a group 0.74.
        cosine = (unit @ unit.transpose(1, 2)) - 2 * torch.eye(200)
        found = float((cosine.amax(dim=-1) > 0.62).float().mean())
        assert found >= share if keys == "similar" else found <= 0.2


def test_flops_of_two_keys():
    # One pair, and one older key for the query of each of two heads: 32 products and sums each; 2 layers of 2 heads.
    settings = Settings((2,), 1, 2, 2, 4, 32, 1, 1, "rows", "float32", 1, 0.0)
    assert needed_flops(settings, 2) == 2 * 2 * 64 * (1 + 2)
    assert needed_flops(settings, 2, "similar") == 2 * 2 * 64 * 2


def test_command_line_and_page(tmp_path, capsys):
    if why := native.unavailable("cpu"):
        pytest.skip(why)
    out = tmp_path / OPERATORS
    words = ["--device", "cpu", "--lengths", "96", "--buffer", "32", "--layers", "1", "--heads", "2", "--dim", "32"]
    words += ["--query-heads", "4", "--threads", "1", "--repeats", "1", "--seconds", "0", "--tokens", "3"]
    command_line.main([*words, "--requests", "1", "2", "--out", str(out)])
    assert "no head moves more tokens than the buffer" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert [(row["keys"], row["requests"]) for row in figures["scoring"]] == [
        (keys, requests) for requests in (1, 2) for keys in ("distinct", "similar")
    ]
    assert all(row["relative_error"] < 1e-5 for row in figures["scoring"] if row["requests"] == 1)
    times = [number for name, number in figures["measuring"][0].items() if name.endswith("_ms")]
    assert len(times) == 9  # three operators: ours, PyTorch's, and their limit
    assert min(times) > 0
    row = figures["compaction"][0]
    assert row["bytes"] == row["fewest_bytes"] <= row["rewrite_bytes"] // 2
    assert row["most_moved_per_head"] <= 32
    assert {row["tokens"] for row in figures["steps"]} == {3}
    page = "\n\n".join(operators_section(figures))
    assert page.count("| 96 | 2 |") == 3
    assert "| corrections | 3 |" in page
    assert "python -m benchmarks.kernels --device cpu --lengths 96" in page


def test_bars_can_be_missed():
    scoring = [{"length": 2176, "speedup_over_rkv": 7.9, "of_matmul": 0.49}]
    compaction = [{"budget": 1024, "buffer": 128, "most_moved_per_head": 129, "speedup_over_rewrite": 4.9}]
    figures = {"scoring": scoring, "compaction": compaction}
    assert [reached for _, reached in check_bars("cpu", SETTINGS, figures).values()] == [False] * 4
    scoring = [{"length": 2176, "speedup_over_rkv": 8.0, "of_matmul": 0.5}]
    compaction = [{"budget": 1024, "buffer": 128, "most_moved_per_head": 128, "speedup_over_rewrite": 5.0}]
    figures = {"scoring": scoring, "compaction": compaction}
    assert [reached for _, reached in check_bars("cpu", SETTINGS, figures).values()] == [True] * 4
    assert len(BARS) == 4


def gpu_figures(slower: float) -> dict[str, list[dict]]:
    """Figures that reach every bar at 1 and none above."""
    similar, distinct, recorded, memory = GPU_BARS.values()
    scoring = [
        {"length": 2176, "requests": 1, "keys": keys, "ours_ms": slower * bar, "formula_bytes": 100}
        | {"ours_peak_bytes": slower * memory * 100}
        for keys, bar in (("similar", similar), ("distinct", distinct))
    ]
    return {
        "scoring": scoring,
        "measuring": [{"error_peak_bytes": 1, "error_formula_bytes": 1}],
        "compaction": [{"buffer": 128, "most_moved_per_head": int(slower * 128)}],
        "steps": [{"operator": "recorded queries, all layers", "tokens": 128, "ours_ms": slower * recorded}],
    }


def test_bars_of_gpus_can_be_missed():
    settings = Settings(**vars(SETTINGS) | SHAPE)
    assert [reached for _, reached in check_bars("cuda", settings, gpu_figures(1.0)).values()] == [True] * 5
    assert [reached for _, reached in check_bars("cuda", settings, gpu_figures(1.1)).values()] == [False] * 5
    # Times of another shape have no bar.
    assert len(check_bars("cuda", SETTINGS, gpu_figures(1.1))) == 2
