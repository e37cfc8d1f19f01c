"""Count the arrows between the rooms of the package: `python -m tests.rooms [COMMIT]`.

A room is a package or module directly below `skipkv_vllm`. An arrow leads from a room to another one that it imports,
once however many imports there are; imports for type checking count. Arrows that cannot all point downwards, however
the rooms are ordered, lead back: as few of them as possible are counted.

The contracts in `pyproject.toml` say which arrows are allowed; `lint-imports` and `tests/unit/repository/test_rooms.py`
check them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

import grimp
import networkx

PACKAGE = "skipkv_vllm"
ROOT = Path(__file__).parents[1]
SHARED = ("core", "errors", "auxiliary")
"""rooms that every other one may import; the last two are parts of `core` in older commits"""

Arrow = tuple[str, str]


def room(module: str) -> str:
    """Return the room of a module; the package itself is a room, too."""
    return (*module.split("."), "__init__")[1]


def arrows(graph: grimp.ImportGraph) -> set[Arrow]:
    """Return all arrows, from the importing room to the imported one."""
    pairs = {
        (room(module), room(imported))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return {(start, end) for start, end in pairs if start != end}


def leading_back(found: Collection[Arrow]) -> set[Arrow]:
    """Return a smallest set of arrows without which no arrows form a loop."""
    back: set[Arrow] = set()
    for loop in networkx.strongly_connected_components(networkx.DiGraph(found)):
        inner = [(start, end) for start, end in found if start in loop and end in loop]
        orders = ({name: i for i, name in enumerate(order)} for order in itertools.permutations(sorted(loop)))
        back |= min(({a for a in inner if place[a[0]] < place[a[1]]} for place in orders), key=len)
    return back


def build(source: Path) -> grimp.ImportGraph:
    """Build the graph of imports of the package below a folder."""
    sys.path.insert(0, str(source))
    try:
        return grimp.build_graph(PACKAGE, cache_dir=None)
    finally:
        sys.path.remove(str(source))


def main() -> None:
    """Print the rooms with their arrows, and the numbers of arrows."""
    parser = argparse.ArgumentParser(prog="python -m tests.rooms", description=__doc__)
    parser.add_argument("commit", nargs="?", help="a commit of this repository; by default the working tree")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        source = ROOT
        if commit is not None:
            packed = subprocess.run(["git", "archive", commit, PACKAGE], cwd=ROOT, check=True, capture_output=True)
            with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as files:
                files.extractall(folder, filter="data")
            source = Path(folder)
        graph = build(source)
    found = arrows(graph)
    for name in sorted({room(module) for module in graph.modules}):
        print(f"{name:12} -> {', '.join(sorted(end for start, end in found if start == name)) or 'nothing'}")
    back = [f"{start} -> {end}" for start, end in sorted(leading_back(found))]
    print(f"{len(found)} arrows, {sum(end not in SHARED for _, end in found)} without those to {', '.join(SHARED)}")
    print(f"{len(back)} lead back{': ' * bool(back)}{', '.join(back)}")


if __name__ == "__main__":
    main()
