"""Engines for tests: one at a time in this process, or in a child process for Model Runner V2.

Starting an engine takes seconds, so tests ask `engine(...)` for one and get the running one if it has the same
settings. Model Runner V2 needs Triton's interpreter for the whole process, which would change what Runner V1 runs, so
`run` gives V2 a process of its own. The environment is set in `conftest.py`.
"""

from tests.harness.jobs import Job, Outcome, run, run_all, run_in_child, run_on, work
from tests.harness.process import (
    assert_pool_empty,
    collector_of,
    engine,
    scheduler_of,
    shutdown,
    stock_engine,
    trace_folder,
    wake,
)
from tests.harness.prompts import chat_prompt, demo_prompts, tokenizer
from tests.harness.requests import Generation, Load, Sample, generate_staggered
from tests.harness.settings import ENGINE_ARGUMENTS, MODEL, PAGE, POLICY_ARGUMENTS, PUBLISHED, REPOSITORY, RUNNERS

__all__ = [
    "ENGINE_ARGUMENTS",
    "MODEL",
    "PAGE",
    "POLICY_ARGUMENTS",
    "PUBLISHED",
    "REPOSITORY",
    "RUNNERS",
    "Generation",
    "Job",
    "Load",
    "Outcome",
    "Sample",
    "assert_pool_empty",
    "chat_prompt",
    "collector_of",
    "demo_prompts",
    "engine",
    "generate_staggered",
    "run",
    "run_all",
    "run_in_child",
    "run_on",
    "scheduler_of",
    "shutdown",
    "stock_engine",
    "tokenizer",
    "trace_folder",
    "wake",
    "work",
]
