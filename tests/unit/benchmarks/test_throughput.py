"""The throughput benchmark without an engine: loads, padding counted by hand, bars, arguments, the page."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from benchmarks import serving
from benchmarks.load.arms import (
    GROUPED,
    PRODUCTION,
    SAME,
    SPECULATIVE,
    Arm,
    add_engine_arguments,
    engine_arguments,
    pool_pages,
)
from benchmarks.load.drafts import NGRAM, Drafts
from benchmarks.load.engine import STEP_COLUMNS, Run
from benchmarks.load.lengths import Offered, add_length_arguments, offered_load, pages_needed
from benchmarks.load.padding import capture_sizes, effects, graph_padding, parallel_padding, static_padding
from benchmarks.results.sections.speculation import speculation_section
from benchmarks.results.sections.throughput import throughput_section
from benchmarks.throughput import __main__ as command_line
from benchmarks.throughput import measure
from benchmarks.throughput.bars import check_bars
from skipkv_vllm import bundled_model


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_arguments(parser, bundled_model())
    add_length_arguments(parser)
    return parser.parse_args(given)


def test_a_load_is_drawn_once_and_keeps_its_limits():
    args = arguments("--requests", "500", "--lengths", "sharegpt", "--output-min", "16", "--prompt-max", "400")
    load = offered_load(args)
    fixed = ["--prompt-min", "70", "--prompt-max", "70", "--output-min", "90", "--output-max", "90", "--requests", "3"]
    assert offered_load(arguments(*fixed)) == [Offered(70, 90)] * 3
    assert load == offered_load(args)
    assert load != offered_load(arguments("--requests", "500", "--seed", "1"))
    assert {min(each.num_output for each in load), max(each.num_prompt for each in load)} == {16, 400}
    assert pages_needed([Offered(1, 31), Offered(1, 32)], 32) == 3


def test_graph_padding_by_hand():
    sizes = capture_sizes(8)
    assert sizes == [1, 2, 4, 8, 16]
    # 3 -> 4 and 9 -> 16; 0 runs nothing, 17 runs without a graph.
    assert graph_padding([3, 8, 9, 0, 17], sizes) == (1 + 7, 20)
    assert capture_sizes(1000)[-1] == 512


def test_parallel_padding_by_hand():
    # A finished rank takes part in further steps without work.
    assert parallel_padding([[5, 1, 1], [2, 3]]) == ((5 - 2) + (3 - 1) + 1, 12)


def test_static_padding_by_hand():
    load = [Offered(10, 4), Offered(2, 6), Offered(7, 1)]
    assert static_padding(load, 2) == (8, 19, 2, 11)
    assert static_padding(load, 1) == (0, 19, 0, 11)


def test_effects_follow_the_order_of_admission():
    load = [Offered(10, 4), Offered(2, 4), Offered(10, 4), Offered(2, 4)]
    steps = np.zeros((4, len(STEP_COLUMNS)))
    steps[:, 2] = [3, 2, 2, 2]
    steps[:, 5] = [0, 2, 1, 0]
    run = Run(steps=steps, compactions=3, admitted=[0, 1, 2, 3])
    found = effects(run, [run, run], load, 2)
    assert found["compactions_a_launch"] == 1.5
    assert found["static_prompt_padding"] == pytest.approx(16 / 24)
    assert found["parallel_padding"] == 0
    run.admitted = [0, 2, 1, 3]
    assert effects(run, [run, run], load, 2)["static_prompt_padding"] == 0


def test_engines_have_equal_memory_and_two_baselines():
    args, load = arguments("--budget", "96"), [Offered(10, 90), Offered(20, 300)]
    production, same, policy, grouped = (
        engine_arguments(args, Arm(name, 0.5), load, 100) for name in (PRODUCTION, SAME, "skipkv", "skipkv" + GROUPED)
    )
    assert "max_num_seqs" not in production
    assert "enable_prefix_caching" not in production
    # 2,048 bytes of KV per token, and 96 bytes of positions, errors and query counts.
    assert pool_pages(args, Arm("skipkv", 0.5), 100) == 100 * 2048 // 2144
    assert (same["num_gpu_blocks_override"], policy["num_gpu_blocks_override"]) == (101, 96)
    assert {key: policy[key] for key in same if key != "num_gpu_blocks_override"} == {
        key: value for key, value in same.items() if key != "num_gpu_blocks_override"
    }
    assert grouped.items() >= {"kv_batch_grouping": "prefill-length", "kv_grouping_width": 32}.items()
    assert production["max_model_len"] == 321
    assert (policy["enable_prefix_caching"], policy["kv_protect_prompt"]) == (False, True)
    changed = engine_arguments(arguments("--prefix-caching", "--no-protect-prompt"), Arm("skipkv", 0.5), load, 100)
    assert (changed["enable_prefix_caching"], changed["kv_protect_prompt"]) == (True, False)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_engines_take_turns_or_run_one_by_one(monkeypatch, tmp_path, one_by_one):
    said = []

    class Engine:
        def __init__(self, arguments, log):
            self.name = arguments["name"]
            said.append(f"start {self.name}")

        def answer(self, order):
            said.append(self.name)
            return Run(seconds=1.0)

        def stop(self):
            said.append(f"stop {self.name}")

    monkeypatch.setattr(measure, "Remote", Engine)
    arms = {Arm("a", 1.0): {"name": "a"}, Arm("b", 1.0): {"name": "b"}}
    runs = measure.in_turns(arms, [measure.Order([Offered(1, 1)], True)], 2, tmp_path, one_by_one=one_by_one)
    assert {arm: len(rounds) for arm, rounds in runs.items()} == dict.fromkeys(arms, 2)
    alone = [word for name in "ab" for word in (f"start {name}", name, name, name, f"stop {name}")]
    together = ["start a", "a", "start b", "b", "a", "b", "b", "a", "stop a", "stop b"]
    assert said == (alone if one_by_one else together)


def test_a_run_writes_its_figures_and_fails_on_a_missed_bar(monkeypatch, tmp_path, capsys):
    class Engine:
        def __init__(self, arguments, log):
            self.evicts = "kv_policy" in arguments

        def answer(self, order):
            steps = np.random.default_rng(0).uniform(1, 9, (50, len(STEP_COLUMNS)))
            steps[:, 5] = self.evicts
            tokens = sum(each.num_output for each in order.load)
            return Run(2.0, tokens, len(order.load), [0.1], np.array([0.1, 0.2]), 2, 0, 50, steps, [0, 1], 0.0, 2048, 9)

        def stop(self):
            pass

    monkeypatch.setattr(measure, "Remote", Engine)
    out = tmp_path / "throughput.json"
    words = ["--requests", "20", "--rounds", "1", "--grouping-rounds", "0", "--pools", "0.1", "1", "--out", str(out)]
    assert command_line.main(words) == 1
    said = capsys.readouterr()
    assert "MISSED  same pool of at most 10 %: the policy over the faster full KV: 1" in said.out
    assert "error: missed: same pool of at most 10 %" in said.err
    figures = json.loads(out.read_text())
    assert [row["arm"] for row in figures["pools"]] == [PRODUCTION, SAME, "skipkv"] * 2
    assert "| 0.1 | skipkv |" in "\n".join(throughput_section(figures))


def test_speculation_compares_four_engines_alike(monkeypatch, tmp_path, capsys):
    class Engine:
        def __init__(self, arguments, log):
            assert arguments["async_scheduling"] is False
            assert arguments["max_model_len"] >= 30 + 40 + NGRAM["num_speculative_tokens"] + 1
            self.evicts, self.speculates = "kv_policy" in arguments, "speculative_config" in arguments

        def answer(self, order):
            seconds = 12 / ((3 if self.evicts else 1) * (2 if self.speculates else 1))
            drafts = Drafts(40, 30) if self.speculates else Drafts()
            steps = np.ones((5, len(STEP_COLUMNS)))
            return Run(seconds, 120, 3, [0.1], np.array([0.1, 0.2]), 2, 0, 5, steps, [0], 0.0, 2048, 9, drafts)

        def stop(self):
            pass

    monkeypatch.setattr(measure, "Remote", Engine)
    out = tmp_path / "speculation.json"
    lengths = ["--prompt-min", "30", "--prompt-max", "30", "--output-min", "40", "--output-max", "40"]
    assert command_line.main(["--speculation", "--requests", "3", *lengths, "--pools", "0.5", "--out", str(out)]) == 0
    assert "75.0%" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    found = {
        row["arm"]: [row[key] for key in ("of_plain", "of_full_alike", "of_full")] for row in figures["speculation"]
    }
    assert found == {
        SAME: [1, 1, 1],
        SAME + SPECULATIVE: [2, 1, 2],
        "skipkv": [1, 3, 3],
        "skipkv" + SPECULATIVE: [2, 3, 6],
    }
    assert [row["acceptance"] for row in figures["speculation"]] == [None, 0.75] * 2
    assert "| 0.5 | skipkv, n-gram | 60 | 2.00 | 3.00 | 6.00 | 75.0% | 40 |" in "\n".join(speculation_section(figures))
    assert not Arm(SAME + SPECULATIVE, 1.0).evicts


def rows(**changes: float) -> list[dict]:
    base = {"of_same": 1.0, "of_production": 1.0, "of_full_at_largest": 1.0, "preemptions": 0}
    small = {"of_same": 3.0, "of_production": 2.6, "of_full_at_largest": 0.9} | changes
    return [base | {"arm": SAME, "pool": 0.1, "preemptions": 9}, base | {"arm": "skipkv", "pool": 0.1} | small] + [
        base | {"arm": "skipkv", "pool": 1.0}
    ]


def test_bars_take_the_harder_baseline_and_only_the_policys_preemptions():
    bars = check_bars(rows(), [])
    assert all(reached for _, reached in bars.values())
    assert bars["same pool of at most 10 %: the policy over the faster full KV"][0] == 2.6
    assert not all(reached for _, reached in check_bars(rows(of_production=2.4), []).values())
    assert not all(reached for _, reached in check_bars(rows(preemptions=1), []).values())
    grouping = [{"of_ungrouped": 0.98, "preemptions": 0, "bound": 1.0, "longest_overtaken": 1.5}]
    missed = [text for text, (_, reached) in check_bars(rows(), grouping).items() if not reached]
    assert missed == ["grouping over no grouping", "overtaken at most 1 s past the turn"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--policy", "full"], "--policy full"),
        (["--pools", "0"], "must be above 0"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--output-min", "9", "--output-max", "8"], "--output-min 9 must be 1 to --output-max 8"),
        (["--budget", "3"], "kv_budget=3 is out of range"),
        (["--requests", "0"], "--requests 0 is out of range"),
        (["--prompt-min", "600"], "--prompt-min 600 must be 1 to --prompt-max 512"),
    ],
)
def test_bad_arguments_are_refused(capsys, given, said):
    with pytest.raises(SystemExit) as stop:
        command_line.main(given)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_bad_arguments_of_servers_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        serving.main(["--policy", "nope"])
    assert stop.value.code == 2
    assert "kv_policy='nope' is unknown" in capsys.readouterr().err


def test_servers_get_the_engines_arguments_as_flags():
    given = {
        "model": "m",
        "max_num_seqs": 4,
        "enforce_eager": False,
        "kv_policy_config": {"mix": 0.2},
        "hf_overrides": {},
    }
    flags = serving.server_flags(given)
    assert flags == ["--max-num-seqs", "4", "--no-enforce-eager", "--kv-policy-config", json.dumps({"mix": 0.2})]


def test_the_prompts_of_a_server_have_the_drawn_lengths(tmp_path):
    from transformers import AutoTokenizer

    load = [Offered(20, 5), Offered(300, 7)]
    path = serving.write_prompts(arguments(), load, tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    assert [line["output_tokens"] for line in lines] == [5, 7]
    for line, each in zip(lines, load, strict=True):
        assert abs(len(tokenizer(line["prompt"]).input_ids) - each.num_prompt) <= 4


def test_the_page_reads_what_a_run_writes():
    run = {
        "command": ["python", "-m", "benchmarks.throughput"], "commit": "c", "date": "d", "note": "",
        "machine": {"cores": 2, "cpu": "x", "gpus": []}, "settings": vars(command_line._parser().parse_args([])),
    }  # fmt: skip
    load = {"requests": 1, "prompt_tokens": 2, "output_tokens": 3, "shortest_output": 3, "pages": 4}
    steps = np.ones((5, len(STEP_COLUMNS)))
    measured = Run(1.0, 3, 1, [0.1], np.array([0.1, 0.2]), 1, 0, 5, steps, [0], 0.0, 2048, 4)
    row = measure.row_of(Arm("skipkv", 0.1), [measured])
    row |= {"of_same": 2.0, "of_production": 2.0, "of_full_at_largest": 1.0}
    figures = {"run": run, "load": load, "pools": [row], "grouping": [], "predictions": []}
    text = "\n\n".join(throughput_section(json.loads(json.dumps(figures, default=str))))
    assert "on d, on 2 cores of x." in text
    run["machine"]["gpus"] = ["GPU A, 80 MiB"]
    assert "on d, on GPU A, 80 MiB." in throughput_section(figures)[-1]
    assert "| 0.1 | skipkv | 3 | 1.00 | 2.00 | 2.00 | 1.00 |" in text
