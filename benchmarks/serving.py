"""Drive `vllm bench serve` against servers with full KV and with a policy, over pool sizes; or against a running one.

    python -m benchmarks.serving --url http://127.0.0.1:8000 --model Qwen/Qwen3-8B --lengths reasoning
    python -m benchmarks.serving --pools 0.1 1 --requests 32 --output-median 1600

The prompts are text, so their lengths differ a little from those that were drawn. `vllm bench serve` reads them with
pandas: pip install pandas.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from skipkv_vllm import KVPolicyError, bundled_model
from skipkv_vllm.evaluation.machine import relative

from .load.arms import PRODUCTION, SAME, Arm, add_engine_arguments, check_engine_arguments, engine_arguments
from .load.lengths import Offered, add_length_arguments, check_length_arguments, offered_load, pages_needed
from .results.pages import publish
from .results.provenance import record
from .server import ServerError, serve

COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "compactions": "skipkv_compactions_total",
    "evicted_tokens": "skipkv_evicted_tokens_total",
}
RUNNING = "vllm:num_requests_running"
POLL_SECONDS = 0.5
Row = dict[str, Any]


class BenchError(RuntimeError):
    """`vllm bench serve` failed; the message ends with its last lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(arguments)
    check_length_arguments(args, parser)
    check_engine_arguments(args, parser)
    if importlib.util.find_spec("pandas") is None:
        parser.error("`vllm bench serve` needs pandas to read prompts from a file; pip install pandas")
    load = offered_load(args)
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="skipkv-serving-") as folder:
            data = write_prompts(args, load, Path(folder))
            for arm in [None] if args.url else [Arm(n, p) for p in args.pools for n in (PRODUCTION, SAME, args.policy)]:
                with _server(args, arm, load, args.logs or Path(folder)) as url:
                    row = drive(args, url, data, len(load), Path(folder))
                rows.append({"arm": arm.name if arm else "running server", "pool": arm.pool if arm else None} | row)
                print(table(rows[-1:], head=len(rows) == 1), flush=True)
    except (BenchError, ServerError, KVPolicyError, urllib.error.URLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        run = record("benchmarks.serving", vars(args) | {"model": relative(args.model)}, arguments)
        publish({"run": run, "servers": rows}, args.out)
    return 0


def write_prompts(args: argparse.Namespace, load: Sequence[Offered], folder: Path) -> Path:
    """Write the load as a data set of `vllm bench serve`: a text and the length of its answer on each line."""
    from transformers import AutoTokenizer

    from .tiny_reasoner.problems import problems

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    text = "\n\n".join(f"{problem.question}\n\n{problem.completion}" for problem in problems("train", 400))
    ids, offset, path = tokenizer.encode(text), 0, folder / "prompts.jsonl"
    with path.open("w") as file:
        for each in load:
            piece = [ids[(offset + i) % len(ids)] for i in range(each.num_prompt)]
            offset += each.num_prompt
            file.write(json.dumps({"prompt": tokenizer.decode(piece), "output_tokens": each.num_output}) + "\n")
    return path


def drive(args: argparse.Namespace, url: str, data: Path, count: int, folder: Path) -> Row:
    """Have `vllm bench serve` send the load to a server; return its figures and those of the server's metrics.

    Raises:
        BenchError: it failed, or not every request was answered.
    """
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai", "--base-url", url,
        "--model", args.model, "--dataset-name", "custom", "--dataset-path", str(data), "--custom-output-len", "-1",
        "--skip-chat-template", "--disable-shuffle", "--num-prompts", str(count), "--request-rate", args.request_rate,
        "--temperature", "0", "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--disable-tqdm",
        "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
    ]  # fmt: skip
    if args.tokenizer:
        command += ["--tokenizer", args.tokenizer]
    if not args.natural_stop:
        command.append("--ignore-eos")
    before = read_metrics(url)
    with _watching(url) as peak:
        done = subprocess.run(command, capture_output=True, text=True)
    result = folder / "result.json"
    if done.returncode or not result.exists():
        raise BenchError("\n".join(["vllm bench serve failed:", *(done.stdout + done.stderr).splitlines()[-12:]]))
    found = json.loads(result.read_text())
    result.unlink()
    if found["completed"] != count:
        raise BenchError(f"{found['completed']} of {count} requests were answered; see the server's log")
    after = read_metrics(url)
    return {
        "tokens_per_second": found["output_throughput"],
        "requests_per_second": found["request_throughput"],
        "output_tokens": found["total_output_tokens"],
        **{f"{name}_ms": found[f"{name}_ms"] for name in ("p50_ttft", "p99_ttft", "p50_itl", "p99_itl")},
        "peak_running": peak[0],
        **{name: int(after.get(key, 0) - before.get(key, 0)) for name, key in COUNTERS.items()},
    }


def read_metrics(url: str) -> dict[str, float]:
    """Read the samples that are used here, summed over engines."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    wanted, values = {*COUNTERS.values(), RUNNING}, dict[str, float]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in wanted:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


@contextmanager
def _watching(url: str) -> Iterator[list[int]]:
    """Yield a list with the largest number of running requests seen while the block runs."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            try:
                peak[0] = max(peak[0], int(read_metrics(url).get(RUNNING, 0)))
            except OSError:
                continue  # a busy server may be late with one answer

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join(15)


@contextmanager
def _server(args: argparse.Namespace, arm: Arm | None, load: Sequence[Offered], logs: Path) -> Iterator[str]:
    """Yield the address of the running server, or start one."""
    if arm is None:
        yield args.url.rstrip("/")
        return
    # A prompt that was cut out of a text may have a few more tokens than the piece it was cut from.
    roomy = [Offered(each.num_prompt + args.slack, each.num_output) for each in load]
    pages = int(arm.pool * pages_needed(roomy, args.block_size))
    flags = server_flags(engine_arguments(args, arm, roomy, pages))
    log = logs / f"{arm.name.replace(', ', '-').replace(' ', '-')}-{arm.pool:g}.log"
    with serve(args.model, flags, port=args.port, log=log) as url:
        yield url


def server_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as flags of `vllm serve`."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if name in ("model", "disable_log_stats") or value == {}:
            continue  # the metrics are needed
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def table(rows: Sequence[Row], *, head: bool) -> str:
    """Format rows for a terminal."""
    columns = {
        "tokens/s": "tokens_per_second", "requests/s": "requests_per_second", "TTFT p50": "p50_ttft_ms",
        "TTFT p99": "p99_ttft_ms", "ITL p50": "p50_itl_ms", "ITL p99": "p99_itl_ms", "at once": "peak_running",
        "preempted": "preemptions", "compactions": "compactions",
    }  # fmt: skip
    lines = [f"{'engine':22}{'pool':>6}" + "".join(f"{name:>12}" for name in columns)] if head else []
    for row in rows:
        pool = "" if row["pool"] is None else f"{row['pool']:g}"
        lines.append(f"{row['arm']:22}{pool:>6}" + "".join(f"{row[key]:12,.5g}" for key in columns.values()))
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="a server that runs; without it, servers are started for each pool")
    parser.add_argument("--pools", type=float, nargs="+", default=[0.1, 1.0], metavar="SHARE")
    parser.add_argument("--request-rate", default="inf", help="requests a second")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--slack", type=int, default=64, help="tokens that a prompt may be longer than drawn")
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this folder")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    add_engine_arguments(parser, bundled_model())
    add_length_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
