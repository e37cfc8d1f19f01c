"""The pages of results: they are the generated ones, their links are valid, and their package imports no benchmark."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results.__main__ import main
from benchmarks.results.links import EVALUATION, SCHEDULING
from benchmarks.results.pages import NAMES, PAGES, publish, render_pages, write_pages
from benchmarks.results.provenance import made_by, record
from benchmarks.results.sections.fidelity import recall_table
from benchmarks.results.store import (
    DOCS,
    FIDELITY,
    OPERATORS_ON_GPU,
    OTHER_TEXTS,
    PAPER,
    RESULTS,
    STEERING,
    TINY,
    read_summary,
)
from skipkv_vllm import KVPolicyError
from tests.harness import REPOSITORY

OURS = REPOSITORY / DOCS
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return render_pages(OURS)


def test_the_pages_are_the_generated_ones(pages):
    written = {path.stem: path.read_text() for path in (OURS / RESULTS).glob("*.md")}
    assert list(pages) == ["summary", *PAGES]
    assert written == pages, "run `python -m benchmarks.results`"


def test_every_summary_is_registered():
    written = {RESULTS / path.name for path in (OURS / RESULTS).glob("*.json")}
    assert written <= set(NAMES)
    # Only a GPU writes this one.
    assert set(NAMES) - written <= {PAPER, OPERATORS_ON_GPU}


def anchors(text: str) -> set[str]:
    """Headings as MkDocs names them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_links_lead_somewhere(pages):
    found = 0
    for name, text in pages.items():
        for file, anchor in LINK.findall(FENCED.sub("", text)):
            found += 1
            if file in (EVALUATION, SCHEDULING):  # the rest of the documentation; its build checks these links
                continue
            target = file.removesuffix(".md") or name
            assert target in pages or (OURS / RESULTS / file).is_file(), (name, file)
            assert not anchor or anchor in anchors(pages[target]), (name, file, anchor)
    assert found > 20


def test_headings_are_unique_where_links_point(pages):
    for name, text in pages.items():
        assert text.startswith("# ")
        assert len(re.findall(r"^# ", FENCED.sub("", text), re.MULTILINE)) == 1, name


def test_tables_are_whole(pages):
    for name, text in pages.items():
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            widths = {line.count(" | ") for line in block.splitlines()}
            assert len(widths) == 1, (name, block.splitlines()[0])


def test_the_package_imports_no_benchmark():
    """Benchmarks import the pages, so the pages must not import them."""
    folder = Path(results.__file__).parent
    imported = set()
    for path in folder.rglob("*.py"):
        depth = len(path.relative_to(folder).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level > depth:
                imported.add(f"benchmarks.{node.module}")
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module))
    assert not [name for name in imported if name.startswith("benchmarks")]


# ---- with some of the summaries


def test_sections_without_their_summaries_are_left_out(tmp_path, capsys):
    assert main(["--docs", str(tmp_path)]) == 2
    assert "has no results; `make eval-tiny` writes the first" in capsys.readouterr().err
    (tmp_path / RESULTS).mkdir()
    for name in (TINY, OTHER_TEXTS):
        shutil.copy(OURS / name, tmp_path / name)
    assert [path.name for path in write_pages(tmp_path)] == ["summary.md", "accuracy.md", "published.md"]
    text = (tmp_path / RESULTS / "accuracy.md").read_text()
    assert "## The bundled model, run here" in text
    assert "## Steering" not in text
    assert main(["--docs", str(tmp_path)]) == 0
    assert "wrote" in capsys.readouterr().out


def test_no_summaries_but_the_published_ones():
    with pytest.raises(KVPolicyError, match="has no results"):
        render_pages(Path("no-such-folder"))


def test_a_summary_is_published_with_its_pages(tmp_path):
    steering = read_summary(OURS / STEERING)
    publish(steering, tmp_path / "elsewhere.json", tmp_path)
    assert not (tmp_path / RESULTS).exists()
    publish(steering, tmp_path / STEERING, tmp_path)
    assert json.loads((tmp_path / STEERING).read_text()) == steering
    assert "## Steering the bundled model" in (tmp_path / RESULTS / "accuracy.md").read_text()


# ---- how figures were made


def test_a_record_and_its_line():
    run = record("benchmarks.x", {"out": Path("a/b"), "n": 1}, ["--n", "1"], note="It was cold.")
    assert run["settings"] == {"out": "a/b", "n": 1}
    assert {"command", "commit", "date", "machine", "versions", "note", "settings"} == set(run)
    run |= {"commit": "c", "date": "2026-01-02", "machine": {"cores": 1, "cpu": "X", "gpus": []}}
    assert (
        made_by(run)
        == "Made by `python -m benchmarks.x --n 1` at commit `c` on 2026-01-02, on 1 core of X. It was cold."
    )
    run["machine"]["gpus"] = ["A", "B"]
    assert ", on A and B." in made_by(run)
    assert made_by({"command": ["p"], "commit": "c"}) == "Made by `p` at commit `c`."


def test_recall_ranks_methods_by_log_probability():
    rows = [
        {"method": method, "budget": budget, "right": right, "questions": 9, "logprob": logprob}
        for method, budget, right, logprob in [
            *[("full", 0, 8, -0.2), ("a", 50, 1, -3.0), ("b", 50, 2, -2.0)],
            *[("a", 100, 3, -1.5), ("b", 100, 2, -1.0)],
        ]
    ]
    assert recall_table(rows).splitlines()[2:] == [
        "| full KV | 8 of 9 | -0.20 |  |  |",
        "| `b` | 2 | **-1.00** | 2 | **-2.00** |",
        "| `a` | 3 | -1.50 | 1 | -3.00 |",
    ]


def test_other_texts_are_compared_with_the_same_defaults():
    ours, others = read_summary(OURS / FIDELITY), read_summary(OURS / OTHER_TEXTS)
    budgets = {str(budget) for budget in ours["settings"]["budgets"]}
    for row in others["rows"]:
        assert row["method"] in ours["settings"]["methods"]
        assert all(excess.keys() == budgets for excess in row["excess"].values())
