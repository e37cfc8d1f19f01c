"""Makes docs/reference/families.md: which tests run which family of models.

python -m tests.families_page > docs/reference/families.md
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.random_models import FAMILIES

FILES = ("tests/engine/test_families.py", "tests/engine/test_parallel.py")
BY_FIXTURE = {"family": list(FAMILIES), "special": [name for name in FAMILIES if FAMILIES[name].is_special]}
"""Fixture of a test -> the families that it runs."""
ABOUT = {
    "deepseek_v3": ("latents (MLA), MoE", "DeepSeek-V2, V3, R1; Kimi-K2"),
    "gemma3": ("full attention in some layers, a sliding window in the others", "Gemma 3 (text), Olmo 3, EXAONE 4"),
    "gemma4": ("the same, with other kv heads in the layers with full attention", "Gemma 4, the larger models"),
    "gpt_oss": ("the same, with attention sinks; MoE", "gpt-oss"),
    "qwen3_moe": ("full attention in all layers, MoE", "Qwen3-30B-A3B, Mixtral"),
    "qwen3_next": ("full attention in some layers, a gated delta net in the others; MoE", "Qwen3-Next, Qwen3.5 (text)"),
}
"""Family -> the structure of its cache, and models of that kind."""
TEXT = """# Families of models

Generated from the tests by `python -m tests.families_page`; a test compares.

Each family stands for the models whose KV cache has the same structure. The tests make a tiny model of it with random
weights (`tests/random_models.py`) and run it in float32 on CPUs. The [support matrix](support-matrix.md) says what
holds on GPUs, and what is refused.

| family | cache | models of this kind |
|---|---|---|
FAMILIES

What "equals reference" compares with is a Hugging Face model that evicts by the same rules.

HEADING
TESTS
"""


def _tests() -> Iterator[tuple[str, set[str]]]:
    """Yield each test with the families that it runs."""
    root = Path(__file__).parents[1]
    for file in FILES:
        for node in ast.parse((root / file).read_text()).body:
            if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
                continue
            found = {family for each in node.args.args for family in BY_FIXTURE.get(each.arg, ())}
            constants = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            found |= constants & FAMILIES.keys()
            if found:
                yield node.name.removeprefix("test_").replace("_", " "), found


def document() -> str:
    """Return the page."""
    about = [f"| `{name}` | {cache} | {models} |" for name, (cache, models) in ABOUT.items()]
    names = list(FAMILIES)
    heading = f"| test | {' | '.join(f'`{name}`' for name in names)} |\n|---|{'---|' * len(names)}"
    tests = [f"| {test} | {' | '.join('✓' if name in found else '' for name in names)} |" for test, found in _tests()]
    text = TEXT.replace("FAMILIES", "\n".join(about)).replace("HEADING", heading)
    return text.replace("TESTS", "\n".join(tests))


if __name__ == "__main__":
    print(document(), end="")
