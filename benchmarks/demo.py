"""Serve the bundled model with SkipKV and show what it saved against full KV on the same prompts.

python -m benchmarks.demo            # what `make demo` runs
python -m benchmarks.demo --keep     # what `make serve` runs: leave the server running
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from transformers import AutoTokenizer

from skipkv_vllm import bundled_model
from skipkv_vllm.evaluation.machine import relative

from .server import ServerError, metrics, serve
from .tiny_reasoner.problems import Problem, extract_answer, problems

MODEL = "tiny-reasoner"
MAX_MODEL_LEN = 2048


@dataclass
class Arm:
    """The figures of one policy on the prompts."""

    right: int
    finished: int
    tokens: int
    seconds: float
    compactions: int
    evicted: int
    freed: int
    peak_blocks: int


def server_arguments(budget: int, buffer: int) -> list[str]:
    """Flags of the demo server. Eager, because compiling takes longer than this model's answers."""
    flags = {
        "--served-model-name": MODEL,
        "--kv-policy": "skipkv",
        "--kv-budget": budget,
        "--kv-buffer": buffer,
        "--block-size": 32,
        "--max-model-len": MAX_MODEL_LEN,
        "--max-num-seqs": 16,
        "--dtype": "float32",
    }
    return [str(part) for flag in flags.items() for part in flag] + ["--enforce-eager"]


def chat_prompts(tasks: list[Problem]) -> list[list[int]]:
    """Token ids of the questions, ready for the answers."""
    chats = [[{"role": "user", "content": task.question}] for task in tasks]
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def run_arm(client: OpenAI, url: str, tasks: list[Problem], prompts: list[list[int]], policy: str) -> Arm:
    """Answer all problems at once with one policy and read the metrics before and after."""
    before = metrics(url)

    # In one call, so that all begin together: one by one they would come in late where the server has all cores.
    started = time.monotonic()
    reply = client.completions.create(
        model=MODEL, prompt=prompts, temperature=0, max_tokens=1200, extra_body={"vllm_xargs": {"kv_policy": policy}}
    )
    seconds = time.monotonic() - started
    time.sleep(1)  # the last step's statistics arrive just after its tokens
    after = metrics(url)

    def counted(name: str) -> int:
        return int(after[name] - before[name])

    return Arm(
        right=sum(extract_answer(choice.text) == tasks[choice.index].answer for choice in reply.choices),
        finished=sum(choice.finish_reason == "stop" for choice in reply.choices),
        tokens=reply.usage.completion_tokens if reply.usage else 0,
        seconds=seconds,
        compactions=counted("skipkv_compactions_total"),
        evicted=counted("skipkv_evicted_tokens_total"),
        freed=counted("skipkv_freed_pages_total"),
        peak_blocks=int(after["skipkv_peak_pages"]),
    )


def table(full: Arm, skipkv: Arm, prompts: int) -> str:
    """The two arms side by side."""
    rows = [
        ("answers right", f"{full.right} of {prompts}", f"{skipkv.right} of {prompts}"),
        ("answers finished", f"{full.finished} of {prompts}", f"{skipkv.finished} of {prompts}"),
        ("tokens generated", f"{full.tokens:,}", f"{skipkv.tokens:,}"),
        ("compactions", f"{full.compactions:,}", f"{skipkv.compactions:,}"),
        ("evicted tokens", f"{full.evicted:,}", f"{skipkv.evicted:,}"),
        ("blocks given back early", f"{full.freed:,}", f"{skipkv.freed:,}"),
        ("blocks held at peak", f"{full.peak_blocks:,}", f"{skipkv.peak_blocks:,}"),
        ("seconds", f"{full.seconds:.1f}", f"{skipkv.seconds:.1f}"),
    ]
    lines = [f"{'':24}{'full KV':>12}{'skipkv':>12}", "-" * 48]
    lines += [f"{name:24}{left:>12}{right:>12}" for name, left, right in rows]
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--buffer", type=int, default=64)
    parser.add_argument("--keep", action="store_true", help="only serve, until Ctrl-C")
    args = parser.parse_args()
    # A supervisor's SIGTERM must stop the server too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    flags = server_arguments(args.budget, args.buffer)
    print("vllm serve", relative(bundled_model()), *flags)
    try:
        with serve(bundled_model(), flags, port=args.port, log=Path("build/demo-server.log")) as url:
            if args.keep:
                print(f"serving at {url}/v1 - model {MODEL!r}; Ctrl-C stops it. Log: build/demo-server.log")
                while True:
                    time.sleep(3600)
            client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
            tasks = list(problems("demo", args.prompts))
            prompts = chat_prompts(tasks)
            print(f"{args.prompts} problems at once, first with skipkv, then with full KV ...")
            # skipkv goes first: the peak gauge only ever rises.
            skipkv = run_arm(client, url, tasks, prompts, "skipkv")
            full = run_arm(client, url, tasks, prompts, "full")
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 0
    print("\n" + table(full, skipkv, args.prompts))
    if skipkv.compactions == 0 or full.compactions > 0:
        print("error: skipkv must compact and full KV must not", file=sys.stderr)
        return 1
    print(f"\nBlocks held at peak: {skipkv.peak_blocks / full.peak_blocks:.0%} of full KV.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
