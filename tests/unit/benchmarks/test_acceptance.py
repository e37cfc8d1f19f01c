"""Acceptance of drafts without engines: counts by hand, differences, a whole run and what it says."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import acceptance
from benchmarks.acceptance import Answer, difference, judge, main, make_texts, propose_ngram, replay
from benchmarks.load.drafts import DraftCounter, Drafts
from benchmarks.results.sections.speculation import acceptance_section, finding
from skipkv_vllm.evaluation.engine import Done, Scores

CYCLE = [5, 6, 7, 8] * 4


def test_drafts_follow_the_longest_ngram():
    assert list(propose_ngram([1, 2, 3, 4, 5, 6, 1, 2])) == [3, 4, 5, 6]
    # Two tokens at least must be found, and a match may be near the end.
    assert list(propose_ngram([1, 2, 3, 2])) == []
    assert list(propose_ngram([1, 2, 1, 2])) == [1, 2]


def propose_next(text):
    """Counts on: right as long as the text does."""
    return [text[-1] + i for i in (1, 2, 3)]


def test_a_replay_goes_on_behind_what_was_accepted():
    # From place 2 on: 3 4 are accepted and 5 is not; then none of 10 11 12; then 21 22, as the text ends.
    text = [1, 2, 3, 4, 9, 20, 21, 22, 23]
    assert replay(text, 1, propose_next) == Drafts(3 + 3 + 2, 2 + 0 + 2)
    # An engine samples the first token without drafts, and needs none for the last.
    assert replay([1, 2, 3], 1, propose_next) == Drafts(0, 0)


def test_every_place_of_a_given_text_is_judged_once():
    text = [1, 2, 3, 9]
    # The model chooses 2, 3 and then 4: accepted, but what it would choose after 4 is not known.
    assert judge(text, 1, [-1, 2, 3, 4], propose_next) == Drafts(3, 3) + Drafts(2, 2) + Drafts(1, 1)
    # It chooses 7 at place 2.
    assert judge(text, 1, [-1, 2, 7, 9], propose_next) == Drafts(3, 1) + Drafts(2, 0) + Drafts(1, 0)
    assert judge([1, 2, 8, 9], 1, [-1, 2, 3, 9], propose_next) == Drafts(2, 2) + Drafts(1, 1) + Drafts(1, 1)


def test_a_model_that_chooses_the_text_accepts_what_repeats():
    assert judge(CYCLE, 8, CYCLE, propose_ngram).share == 1
    assert replay(CYCLE, 8, propose_ngram).share == 1
    assert judge(CYCLE, 8, [0] * len(CYCLE), propose_ngram).share == 0


def test_a_difference_is_of_totals_and_its_interval_over_texts():
    same = [Drafts(10, 5), Drafts(30, 20)]
    assert difference(same, same) == pytest.approx((0, 0, 0))
    ours, theirs = [Drafts(10, 9), Drafts(10, 7)], [Drafts(10, 5), Drafts(10, 5)]
    # Shares by text differ by 0.4 and 0.2: a mean of 0.3 with a standard error of 0.1.
    assert difference(ours, theirs) == pytest.approx((0.3, 0.3 - 0.196, 0.3 + 0.196), abs=1e-4)


def test_drafts_are_counted_by_request():
    said = []
    scheduler = Namespace(make_spec_decoding_stats=lambda *args, **kwargs: said.append((args, kwargs)))
    counter = DraftCounter(scheduler)
    for name, verified, accepted in (("a", 4, 1), ("b", 2, 2), ("a", 4, 3)):
        scheduler.make_spec_decoding_stats(
            None, num_draft_tokens=verified, num_accepted_tokens=accepted, num_invalid_spec_tokens=None, request_id=name
        )
    assert counter.by_request == {"a": Drafts(8, 4), "b": Drafts(2, 2)}
    assert counter.total() == Drafts(10, 6)
    assert len(said) == 3
    assert Drafts().share is None


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Namespace:
        return Namespace(input_ids=[ord(letter) for letter in text])


def test_texts_are_drawn_anew():
    texts = make_texts("reasoning", Letters(), 3, 100)
    assert [len(text) for text in texts] == [100] * 3
    assert len({tuple(text) for text in texts}) == 3


@pytest.fixture
def engines(monkeypatch):
    """Engines that continue with a cycle; with eviction they accept fewer drafts and choose other tokens."""

    class Remote:
        def __init__(self, body, arguments, log):
            (given,) = arguments
            assert given["speculative_config"]["method"] == "ngram"
            assert given["async_scheduling"] is False
            assert given["max_model_len"] >= 64 + 4 + 1

        def ask(self, order):
            evicts = order.options["kv_policy"] != "full"
            tokens = (CYCLE * order.num_new)[: order.num_new]
            return [Answer(tokens, Drafts(10, 5 if evicts else 8), 2 * evicts) for _ in order.prompts]

        def stop(self):
            pass

    @contextlib.contextmanager
    def serve(setup, group, log):
        def answer(jobs):
            for job in jobs:
                chosen = np.array(job.tokens[1:]) * (job.method == "full")
                yield Done(job.key, [], 2, Scores(np.stack([chosen, chosen], axis=1), np.zeros((len(chosen), 2))))

        yield answer

    monkeypatch.setattr(acceptance, "Remote", Remote)
    monkeypatch.setattr(acceptance, "serve", serve)
    monkeypatch.setattr(acceptance, "load_tokenizer", lambda _: Letters())
    return Remote


WORDS = ["--kind", "reasoning", "--texts", "3", "--length", "64", "--buffer", "16", "--granularity", "head"]


def test_a_run_compares_the_same_texts(engines, tmp_path, capsys):
    out = tmp_path / "acceptance.json"
    assert main([*WORDS, "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert (figures["budget"], figures["compactions"]) == (32, 2)
    rows = {row["text"]: row for row in figures["rows"]}
    assert list(rows) == ["own", "replayed", "full", "source"]
    assert rows["own"]["drafts"] == [[30, 24], [30, 15]]
    assert rows["own"]["difference"] == pytest.approx([-0.3] * 3)
    assert rows["replayed"]["difference"] == [0, 0, 0]
    (verified, accepted), (again, none) = rows["full"]["drafts"]
    assert (verified, none) == (again, 0)
    assert 0 < accepted <= verified
    text = "\n\n".join(acceptance_section(figures))
    assert "-30.0 come from the drafts that the engine leaves out" in text
    assert "-30.0 come from the drafts that the engine leaves out" in capsys.readouterr().out


def test_a_budget_at_which_nothing_is_evicted_is_refused(engines, monkeypatch, capsys):
    monkeypatch.setattr(engines, "ask", lambda self, order: [Answer([1], Drafts(1, 1), 0) for _ in order.prompts])
    assert main(WORDS) == 2
    assert "nothing was evicted" in capsys.readouterr().err
    assert main([*WORDS[:2], "--texts", "1"]) == 2
    assert "--texts 1 is out of range" in capsys.readouterr().err


def test_the_finding_tells_left_out_drafts_from_other_texts():
    rows = [
        {"text": "own", "difference": [0.05, 0.04, 0.06]},
        {"text": "replayed", "difference": [0.01, 0.0, 0.02]},
        {"text": "full", "difference": [-0.001, 0, 0]},
        {"text": "source", "difference": [0.002, 0, 0]},
    ]
    assert "more than 2 points from that without: +5.0 points. Of these, +4.0 come from" in finding(rows)
    assert "Other texts account for +1.0." in finding(rows)
    assert "the difference is -0.1 (the answer of full KV) and +0.2 points" in finding(rows)
    rows[0]["difference"] = [0.01, -0.01, 0.03]
    assert "within 2 points of that without: +1.0 points; the interval reaches further." in finding(rows)
    rows[0]["difference"] = [0.01, 0.0, 0.02]
    assert "within 2 points of that without: +1.0 points. Of" in finding(rows)
