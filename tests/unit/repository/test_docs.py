"""What the documents name exists: pages, headings, files, modules and make targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
DOCS = REPOSITORY / "docs"
PACKAGE = REPOSITORY / "skipkv_vllm"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PAGES]
MADE = [*DOCS.glob("results/*.md"), *(DOCS / "reference" / f"{name}.md" for name in ("flags", "methods"))]
"""Pages that are made from data or code, whose lines are as long as their sentences."""

FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FOLDERS = ("skipkv_vllm", "docs", "tests", "benchmarks", "csrc", "deploy", "patches", "scripts", "packaging")
EXAMPLES = {"skipkv_vllm/policies/my_method.py"}
"""Files that a reader is told to write."""

by_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def anchors(path: Path) -> list[str]:
    """Anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ +(.+?) *$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]


def spans(path: Path) -> list[str]:
    """Inline code of a document."""
    return re.findall(r"`([^`\n]+)`", FENCED.sub("", path.read_text()))


def named_paths(path: Path) -> Iterator[str]:
    """Files and folders of the repository that a document's inline code names."""
    for span in spans(path):
        for word in re.findall(r"[\w./*-]+", span):
            folder, slash, rest = word.partition("/")
            if slash and rest and folder in FOLDERS and word not in EXAMPLES:
                yield word


@by_document
def test_links_lead_somewhere(path):
    for target in LINK.findall(FENCED.sub("", path.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        assert not path.is_relative_to(DOCS) or page.is_relative_to(DOCS), f"{target} is no part of the site"
        assert not anchor or anchor in anchors(page), target


@by_document
def test_headings_are_unique(path):
    if path.parent != DOCS / "results":
        assert len(anchors(path)) == len(set(anchors(path)))


@by_document
def test_files_exist(path):
    for word in named_paths(path):
        found = list(REPOSITORY.glob(word.rstrip("/"))) if "*" in word else [REPOSITORY / word]
        assert found, word
        assert all(each.exists() for each in found), word


@pytest.mark.parametrize("path", sorted(DOCS.glob("design/*.md")), ids=lambda path: path.name)
def test_files_of_the_package_exist(path):
    """Pages about the design name files from the package on."""
    rooms = [each.name for each in PACKAGE.iterdir() if each.is_dir()]
    for span in spans(path):
        if re.fullmatch(rf"({'|'.join(rooms)})/[\w./]*", span):
            assert (PACKAGE / span).exists(), span


def test_the_list_of_rooms_is_complete():
    """The overview names every folder and file at the top of the package, and no other."""
    text = (DOCS / "design" / "overview.md").read_text()
    block = re.search(r"^skipkv_vllm/\n(.*?)^csrc/", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    named = set(re.findall(r"^  ([\w.]+)/?  ", block[1], re.MULTILINE))
    there = {each.name for each in PACKAGE.iterdir() if each.suffix in ("", ".py") and "__" not in each.name}
    assert named == there - {"models"}


@by_document
def test_modules_exist(path):
    text = path.read_text()
    for name in set(re.findall(r"python -m ((?:skipkv_vllm|benchmarks|tests)[\w.]*\w)", text)):
        parts = REPOSITORY.joinpath(*name.split("."))
        assert parts.with_suffix(".py").exists() or (parts / "__main__.py").exists(), name


@by_document
def test_names_of_the_package_exist(path):
    for span in spans(path):
        found = re.match(r"skipkv_vllm((?:\.\w+)+)", span)
        if found is None:
            continue
        each = import_module("skipkv_vllm")
        for part in found[1][1:].split("."):
            each = getattr(each, part) if hasattr(each, part) else import_module(f"{each.__name__}.{part}")


@by_document
def test_make_targets_exist(path):
    makefile = (REPOSITORY / "Makefile").read_text()
    text = path.read_text()
    commands = re.findall(r"^make ([a-z -]+)", text, re.MULTILINE) + re.findall(r"`make ([a-z -]+)", text)
    for target in " ".join(commands).split():
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@by_document
def test_lines_fit(path):
    if path in MADE:
        return
    long = [line for line in path.read_text().splitlines() if len(line) > 120 and not line.lstrip().startswith("|")]
    assert not long


def test_the_navigation_has_every_page():
    def pages(entries: list) -> Iterator[str]:
        for entry in entries:
            for each in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(each) if isinstance(each, list) else [each]

    navigation = list(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert len(navigation) == len(set(navigation))
    assert set(navigation) == {str(path.relative_to(DOCS)) for path in PAGES}


def sources() -> list[Path]:
    folders = [REPOSITORY / name for name in ("skipkv_vllm", "benchmarks", "tests", "deploy", "scripts", "csrc", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [REPOSITORY / name for name in ("Makefile", "Dockerfile", "docker-compose.yml", "pyproject.toml")]
    return [path for path in files if path.suffix in ("", ".py", ".yml", ".toml", ".sh", ".md", ".cpp", ".cu", ".h")]


def test_pages_that_the_code_names_exist():
    """Messages, comments and alerts send readers to pages, and to headings in them."""
    named = {
        (match[0], path)
        for path in sources()
        for match in re.finditer(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?", path.read_text())
    }
    assert len(named) > 10
    for target, path in named:
        name, _, anchor = target.partition("#")
        assert (REPOSITORY / name).exists(), f"{path}: {target}"
        assert not anchor or anchor in anchors(REPOSITORY / name), f"{path}: {target}"
