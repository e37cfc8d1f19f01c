"""How many problems the bundled model solves, in the real engine, greedily.

python -m benchmarks.tiny_reasoner.evaluate --problems 200
python -m benchmarks.tiny_reasoner.evaluate --kv-policy skipkv --kv-budget 256 --kv-buffer 64
"""

from __future__ import annotations

import argparse
import os

from skipkv_vllm import bundled_model

from .problems import SPLITS, extract_answer, problems


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=bundled_model())
    parser.add_argument("--split", default="held-out", choices=[name for name in SPLITS if name != "train"])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--kv-policy", default="full")
    parser.add_argument("--kv-budget", type=int, default=1024)
    parser.add_argument("--kv-buffer", type=int, default=128)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

    from vllm import SamplingParams

    from skipkv_vllm import LLM

    policy = {"kv_policy": args.kv_policy}
    if args.kv_policy != "full":
        policy |= {"kv_budget": args.kv_budget, "kv_buffer": args.kv_buffer}
    llm = LLM(
        args.model, max_model_len=2048, max_num_seqs=32, block_size=32, dtype="float32", enforce_eager=True, **policy
    )
    tasks = list(problems(args.split, args.problems))
    chats = [[{"role": "user", "content": task.question}] for task in tasks]
    outputs = [o.outputs[0] for o in llm.chat(chats, SamplingParams(temperature=0, max_tokens=1500))]
    right = sum(extract_answer(o.text) == task.answer for o, task in zip(outputs, tasks, strict=True))
    finished = sum(o.finish_reason == "stop" for o in outputs)
    tokens = sum(len(o.token_ids) for o in outputs) / len(outputs)
    print(
        f"{args.kv_policy}: {right}/{len(tasks)} right ({right / len(tasks):.1%}), {finished} finished, "
        f"{tokens:.0f} tokens generated on average"
    )


if __name__ == "__main__":
    main()
